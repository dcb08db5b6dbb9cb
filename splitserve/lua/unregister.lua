-- Removes a worker and all its claims.
-- KEYS: worker, index of worker ids, block set
-- ARGV: worker id, epoch
-- Returns 1, or 0 if another incarnation is the current one. The epoch counter stays: it orders incarnations.
redis.call('DEL', KEYS[3])
local current = redis.call('HGET', KEYS[1], 'epoch')
if current and current ~= ARGV[2] then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
return 1
