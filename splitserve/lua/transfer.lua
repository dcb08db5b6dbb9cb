-- Notes how far a transfer is. States only advance: a late writer can't move one back.
-- KEYS: transfer
-- ARGV: life in ms, rank of the state, then field/value pairs
if tonumber(redis.call('HGET', KEYS[1], 'rank') or '-1') > tonumber(ARGV[2]) then
  return 0
end
redis.call('HSET', KEYS[1], 'rank', ARGV[2], unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
