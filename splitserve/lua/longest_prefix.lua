-- How many leading blocks of a chain each worker owns.
-- KEYS: one block set a worker
-- ARGV: the hashes of the chain, in order
-- Returns one number a key. Owned blocks of a chain are a prefix of it, so bisection finds its end.
local counts = {}
for i, key in ipairs(KEYS) do
  local owned, bound = 0, #ARGV
  while owned < bound do
    local middle = math.floor((owned + bound + 1) / 2)
    if redis.call('SISMEMBER', key, ARGV[middle]) == 1 then
      owned = middle
    else
      bound = middle - 1
    end
  end
  counts[i] = owned
end
return counts
