-- Gives each of KEYS its new value, if all still have their old values. ARGV: for each key the old value and
-- the new value, '' for none, and the lifetime of the new value in ms. A key whose value does not change
-- keeps its lifetime. The reply is 1 if all had their old values, else 0.
for i = 1, #KEYS do
  if (redis.call('GET', KEYS[i]) or '') ~= ARGV[3 * i - 2] then return {0} end
end
-- A user may lack the right to DEL: as in batch.lua, it comes before the first write that charges.
for i = 1, #KEYS do
  if ARGV[3 * i - 1] == '' and ARGV[3 * i - 2] ~= '' then redis.call('DEL', KEYS[i]) end
end
for i = 1, #KEYS do
  local value = ARGV[3 * i - 1]
  if value ~= ARGV[3 * i - 2] and value ~= '' then
    redis.call('SET', KEYS[i], value, 'PX', ARGV[3 * i])
  end
end
return {1}
