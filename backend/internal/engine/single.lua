-- One charge, decided by itself. KEYS: its key. ARGV: header, numbers, cost and, unless it is a take without a floor, op, at
-- and, if it is not 0, the floor.
-- The reply is one string, for a table costs as much as the arithmetic: the time, as a number of 7 bytes that is negative if no
-- state changed, and the state as it was, or nothing. A state without tail, in the unit of the limit, is read and written in
-- line: to build the functions costs as much again.
local A = ARGV
local h = A[1]
local unit, p1, p2, p3, p4, p5, p6, p7, p8
if #A[2] == FEW then
  p7, p8, unit, p1, p2, p3, p4, p5, p6 = 0, 0, unpack(NUMBERS, A[2])
else
  unit, p1, p2, p3, p4, p5, p6, p7, p8 = unpack(MORE, A[2])
end
local n = #h
local v = unit > 0 and call('GET', KEYS[1]) -- a rule of unit 0 keeps no state: that of another rule stays
local u, a, b, c, tail = 0, 0, 0, 0
if v then
  local size = #v - n
  if (size == 21 or size == 14) and sub(v, 1, n) == h then
    u = unit
    if size == 21 then
      a, b, c = unpack('>I7I7I7', v, n + 1)
    else
      a, b = unpack('>I7I7', v, n + 1)
    end
    if a >= BIG or b >= BIG or c >= BIG then return FOREIGN end
  else
    HELPERS
    u, a, b, c, tail = decode(v, h)
    if not u then return FOREIGN end
  end
end
local allowed, changed, reset
allowed, changed, reset, u, a, b, c, tail = kernel(u, a, b, c, tail, (A[4] or 0) + 0, A[3] + 0, (A[5] or 0) + 0, now,
  unit, p1, p2, p3, p4, p5, p6, p7, p8, (A[6] or 0) + 0, floor, ceil, min, max)
if not changed then return pack('>i7', -now) .. (v or '') end
if u == 0 then
  call('DEL', KEYS[1])
  return pack('>i7', now) .. (v or '')
end
local state
if u ~= unit or tail then
  HELPERS
  state = encode(h, u, a, b, c, tail)
elseif c > 0 then
  state = h .. pack('>I7I7I7', a, b, c)
else
  state = h .. pack('>I7I7', a, b)
end
call('SET', KEYS[1], state, 'PX', ceil(reset / 1000) + SLACK)
return pack('>i7', now) .. (v or '')
