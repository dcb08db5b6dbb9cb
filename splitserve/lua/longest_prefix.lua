-- How many leading blocks of a prompt each worker owns.
-- KEYS: one block set a worker
-- ARGV: bytes of one hash; the hashes of the prompt's blocks, in order, as one string
-- Returns one number a key, all in one string with commas between, which a client reads faster than so many replies.
-- Owned blocks of a prompt are a prefix of it, so bisection finds its end; most workers own nothing of it, so its first
-- block is asked for before.
local size, hashes, counts = tonumber(ARGV[1]), ARGV[2], {}
local length, first = #hashes / size, string.sub(hashes, 1, size)

local function owns(key, hash)
  return redis.call('SISMEMBER', key, hash) == 1
end

for i, key in ipairs(KEYS) do
  local owned, bound = 0, 0
  if owns(key, first) then
    owned, bound = 1, length
  end
  while owned < bound do
    local middle = math.floor((owned + bound + 1) / 2)
    if owns(key, string.sub(hashes, (middle - 1) * size + 1, middle * size)) then
      owned = middle
    else
      bound = middle - 1
    end
  end
  counts[i] = owned
end
return table.concat(counts, ',')
