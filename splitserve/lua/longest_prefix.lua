-- How many leading blocks of a chain each worker owns.
-- KEYS: one block set a worker
-- ARGV: bytes of one hash; the hashes of the chain, in order, as one string
-- Returns one number a key. Owned blocks of a chain are a prefix of it, so bisection finds its end; most workers
-- own nothing of a chain, so its first block is asked for before.
local size, chain, counts = tonumber(ARGV[1]), ARGV[2], {}
local length = #chain / size

local function owns(key, position)
  return redis.call('SISMEMBER', key, string.sub(chain, (position - 1) * size + 1, position * size)) == 1
end

for i, key in ipairs(KEYS) do
  local owned, bound = 0, length
  if owns(key, 1) then
    owned = 1
  else
    bound = 0
  end
  while owned < bound do
    local middle = math.floor((owned + bound + 1) / 2)
    if owns(key, middle) then
      owned = middle
    else
      bound = middle - 1
    end
  end
  counts[i] = owned
end
return counts
