-- A list of charges, all or none. KEYS: one for each charge, and the request id's if there is one.
-- ARGV: '' or what the record of a grant begins with, the record's lifetime in ms, then for each charge
-- header, numbers, cost, op, at.
HELPERS
-- write keeps a state until it is fresh and a second longer, and deletes a fresh one.
local function write(key, v, reset)
  if v then
    call('SET', key, v, 'PX', ceil(reset / 1000) + SLACK)
  else
    call('DEL', key)
  end
end

local A = ARGV
local n = (#A - 2) / 5
if KEYS[n + 1] then
  local grant = call('GET', KEYS[n + 1])
  if grant then return {grant} end
end
local reply, old, new = {now}, {}, {}
for i = 1, n do
  local v = call('GET', KEYS[i])
  local s = {0, 0, 0, 0}
  if v then
    s = {decode(v, A[5 * i - 2])}
    if not s[1] then return FOREIGN end
  end
  reply[i + 1], old[i] = v, s
end
local function run(i, op, cost)
  local s, j = old[i], 5 * i - 2
  local header = A[j]
  local kernel = kernels[sub(header, 2, 1 + byte(header, 1))]
  return {kernel(s[1], s[2], s[3], s[4], s[5], op, cost, A[j + 4] + 0, now, unpack(NUMBERS, A[j + 1]))}
end
local granted = true
for i = 1, n do
  new[i] = run(i, A[5 * i + 1] + 0, A[5 * i] + 0)
  granted = granted and new[i][1]
end
if not granted then
  -- A denied list changes nothing, but a state ahead of the clock is moved to it.
  for i = 1, n do
    local op = A[5 * i + 1] + 0
    new[i] = run(i, 1, op <= 1 and A[5 * i] + 0 or 0)
  end
end
-- Whatever can fail comes before the first write.
local values = {}
for i = 1, n do
  local s = new[i]
  if s[2] then
    values[i] = encode(A[5 * i - 2], s[4], s[5], s[6], s[7], s[8])
    if not (s[3] >= 0 and s[3] < BIG) then error('FLEETQUOTA the kernel returned no time') end
  end
end
-- A user may lack the right to DEL, which then must fail before anything is set.
for i = 1, n do
  if values[i] == false then write(KEYS[i], false) end
end
for i = 1, n do
  if values[i] then write(KEYS[i], values[i], new[i][3]) end
end
if not granted then
  reply[1] = -now
elseif KEYS[n + 1] and A[1] ~= '' then
  local record = {A[1], pack('>I7', now)}
  for i = 1, n do
    local v = reply[i + 1] or ''
    record[#record + 1] = pack('>I7', #v)
    record[#record + 1] = v
  end
  call('SET', KEYS[n + 1], table.concat(record), 'PX', A[2])
end
return reply
