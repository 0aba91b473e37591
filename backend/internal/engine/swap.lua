-- Each of KEYS gets a new value if all still have their old ones. ARGV: for each key the old value and
-- the new one, '' for none, and the new one's lifetime in ms.
for i = 1, #KEYS do
  if (redis.call('GET', KEYS[i]) or '') ~= ARGV[3 * i - 2] then return {0} end
end
for i = 1, #KEYS do
  if ARGV[3 * i - 1] == '' then
    redis.call('DEL', KEYS[i])
  else
    redis.call('SET', KEYS[i], ARGV[3 * i - 1], 'PX', ARGV[3 * i])
  end
end
return {1}
