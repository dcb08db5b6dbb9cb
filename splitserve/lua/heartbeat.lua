-- Renews the lease of one incarnation and rewrites what it says of itself.
-- KEYS: epoch counter, worker, index of worker ids, block set
-- ARGV: worker id, lease in ms, life of the epoch counter in ms, epoch, then field/value pairs
-- Returns 'ok', 'superseded' (a newer incarnation exists; nothing was written) or
-- 'lost' (Redis had no such incarnation: written again, but without its blocks).
local last = tonumber(redis.call('GET', KEYS[1])) or 0
local epoch = tonumber(ARGV[4])
if last > epoch then
  return 'superseded'
end
local known = redis.call('HGET', KEYS[2], 'epoch') == ARGV[4]
redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[3])
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'lease_ms', ARGV[2], unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[2], ARGV[2])
redis.call('SADD', KEYS[3], ARGV[1])
if not known then
  redis.call('DEL', KEYS[4])
  return 'lost'
end
-- A moment longer than the lease, so that a lease that still stands never lacks its claims.
redis.call('PEXPIRE', KEYS[4], tonumber(ARGV[2]) + 10)
return 'ok'
