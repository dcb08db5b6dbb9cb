-- Adds blocks to, and removes blocks from, what one incarnation owns.
-- KEYS: epoch counter, worker, block set
-- ARGV: epoch, 1 to drop all claims first, number of filled blocks, filled hashes, evicted hashes
-- Returns 1, or 0 if this incarnation is not the current one or its lease has ended (nothing was written).
if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[1] then
  return 0
end
local filled = tonumber(ARGV[3])
if ARGV[2] == '1' then
  redis.call('DEL', KEYS[3])
end
if filled > 0 then
  redis.call('SADD', KEYS[3], unpack(ARGV, 4, 3 + filled))
end
if #ARGV > 3 + filled then
  redis.call('SREM', KEYS[3], unpack(ARGV, 4 + filled))
end
-- A moment longer than the lease, so that a lease that still stands never lacks its claims.
redis.call('PEXPIRE', KEYS[3], redis.call('PTTL', KEYS[2]) + 10)
return 1
