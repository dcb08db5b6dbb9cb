-- The live workers.
-- KEYS: index of worker ids
-- ARGV: prefix of worker keys
-- Returns {milliseconds of lease left, {field, value, ...}} for each; ids whose lease has ended leave the index.
local live = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local key = ARGV[1] .. id
  local fields = redis.call('HGETALL', key)
  if #fields == 0 then
    redis.call('SREM', KEYS[1], id)
  else
    live[#live + 1] = {redis.call('PTTL', key), fields}
  end
end
return live
