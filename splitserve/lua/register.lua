-- A new incarnation of a worker.
-- KEYS: epoch counter, worker, index of worker ids
-- ARGV: worker id, lease in ms, life of the epoch counter in ms, prefix of block sets, then field/value pairs
-- Returns the new epoch. It is never below the clock (ms), so epochs grow even when Redis has lost the counter.
local now = redis.call('TIME')
local clock = tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
local last = tonumber(redis.call('GET', KEYS[1])) or 0
local old = redis.call('HGET', KEYS[2], 'epoch')
local epoch = string.format('%.0f', math.max(last + 1, clock))
if old then
  redis.call('DEL', ARGV[4] .. ARGV[1] .. '@' .. old)
end
redis.call('SET', KEYS[1], epoch, 'PX', ARGV[3])
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'lease_ms', ARGV[2], unpack(ARGV, 5))
redis.call('HSET', KEYS[2], 'epoch', epoch)
redis.call('PEXPIRE', KEYS[2], ARGV[2])
redis.call('SADD', KEYS[3], ARGV[1])
return epoch
