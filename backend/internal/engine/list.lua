-- Lists of charges that go together, each all or none, decided in order. KEYS: theirs, each once, and the
-- request id's if the only list has one. ARGV: '' or what the record of a grant begins with, the record's
-- lifetime in ms, the number of lists; for each of these 'key op cost at' of its charges; then for each of
-- KEYS header and numbers. It answers with the time, how many lists were granted, and the states as they
-- were; 0 stands for what is no text.
HELPERS
local A, K = ARGV, KEYS
local lists = A[3] + 0
local n = (#A - 3 - lists) / 2
if K[n + 1] then
  local grant = call('GET', K[n + 1])
  if grant then return {grant} end
end
local reply, states, kernel, params, lifetimes = {now, 0}, {}, {}, {}, {}
for k = 1, n do
  local h = A[lists + 2 * k + 2]
  local v = pcall('GET', K[k])
  local s = {0, 0, 0, 0}
  if type(v) == 'table' then
    v, s = 0, {}
  elseif v then
    s = {decode(v, h)}
  end
  reply[k + 2], states[k], params[k] = v, s, A[lists + 2 * k + 3]
  kernel[k] = kernels[sub(h, 2, 1 + byte(h, 1))]
end
-- decide returns what the kernel says of a charge, or nothing if its key holds no state of its rule.
local function decide(k, op, cost, at)
  local s = states[k]
  if not s[1] then return end
  return {kernel[k](s[1], s[2], s[3], s[4], s[5], op, cost, at, now, unpack(NUMBERS, params[k]))}
end
local granted = 0
for i = 1, lists do
  local charges, new, all, sound = {}, {}, true, true
  for k, op, cost, at in gmatch(A[3 + i], '(%d+) (%d+) (%d+) (%d+)') do
    local c = {k + 0, op + 0, cost + 0, at + 0}
    local d = decide(c[1], c[2], c[3], c[4])
    charges[#charges + 1], new[#new + 1] = c, d or false
    sound = sound and d
    all = all and d and d[1]
  end
  if sound then
    if all then
      granted = granted + 1
    else
      -- A denied list changes nothing, but a state ahead of the clock is moved to it.
      for j, c in ipairs(charges) do
        new[j] = decide(c[1], 1, c[2] <= 1 and c[3] or 0, c[4])
      end
    end
    for j, c in ipairs(charges) do
      local d = new[j]
      if d[2] then
        if not (d[3] >= 0 and d[3] < BIG) then error('FLEETQUOTA the kernel returned no time') end
        states[c[1]], lifetimes[c[1]] = {d[4], d[5], d[6], d[7], d[8]}, ceil(d[3] / 1000) + SLACK
      end
    end
  end
end
-- Whatever can fail comes before the first write; a user may lack the right to DEL.
local values = {}
for k in pairs(lifetimes) do
  local s = states[k]
  values[k] = encode(A[lists + 2 * k + 2], s[1], s[2], s[3], s[4], s[5])
end
for k = 1, n do
  if values[k] == false then call('DEL', K[k]) end
end
for k = 1, n do
  if values[k] then call('SET', K[k], values[k], 'PX', lifetimes[k]) end
end
if granted > 0 and K[n + 1] and A[1] ~= '' then
  local record = {A[1], pack('>I7', now)}
  for k = 1, n do
    local v = reply[k + 2] or ''
    record[#record + 1] = pack('>I7', #v)
    record[#record + 1] = v
  end
  call('SET', K[n + 1], table.concat(record), 'PX', A[2])
end
reply[2] = granted
return reply
