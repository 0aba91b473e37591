-- Returns the time and the values of KEYS.
local reply = {now}
for i = 1, #KEYS do reply[i + 1] = call('GET', KEYS[i]) end
return reply
