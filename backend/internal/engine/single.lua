-- One charge. KEYS: the key. ARGV: header, op, cost, at, unit, p1 to p6. A state without C and tail, in the
-- limit's own unit, is read and written in line: building functions costs as much as the arithmetic.
local A = ARGV
local h, unit = A[1], A[5] + 0
local n = #h
local v = call('GET', KEYS[1])
local u, a, b, c, tail = 0, 0, 0, 0
if v then
  if #v == n + 14 and sub(v, 1, n) == h then
    local a1, a2, a3, a4, a5, a6, a7, b1, b2, b3, b4, b5, b6, b7 = byte(v, n + 1, n + 14)
    u = unit
    a = (((((a1 * 256 + a2) * 256 + a3) * 256 + a4) * 256 + a5) * 256 + a6) * 256 + a7
    b = (((((b1 * 256 + b2) * 256 + b3) * 256 + b4) * 256 + b5) * 256 + b6) * 256 + b7
    if a >= BIG or b >= BIG then return FOREIGN end
  else
    HELPERS
    u, a, b, c, tail = decode(v, h)
    if not u then return FOREIGN end
  end
end
local allowed, changed, reset
allowed, changed, reset, u, a, b, c, tail = kernel(u, a, b, c, tail, A[2] + 0, A[3] + 0, A[4] + 0, now,
  unit, A[6] + 0, A[7] + 0, A[8] + 0, A[9] + 0, A[10] + 0, A[11] + 0)
if not changed then return {-now, v} end
if u == 0 then
  call('DEL', KEYS[1])
  return {now, v}
end
local state
if u == unit and c == 0 and not tail then
  local al, bl = a % 16777216, b % 16777216
  local ah, bh = (a - al) / 16777216, (b - bl) / 16777216
  local ac, af, bc, bf = ah % 65536, al % 65536, bh % 65536, bl % 65536
  local ad, ag, bd, bg = ac % 256, al % 256, bc % 256, bl % 256
  local ab, bb = (ah - ac) / 65536, (bh - bc) / 65536
  local ae, be = ab % 256, bb % 256
  state = h .. char((ab - ae) / 256, ae, (ac - ad) / 256, ad, (al - af) / 65536, (af - ag) / 256, ag,
    (bb - be) / 256, be, (bc - bd) / 256, bd, (bl - bf) / 65536, (bf - bg) / 256, bg)
else
  HELPERS
  state = encode(h, u, a, b, c, tail)
end
call('SET', KEYS[1], state, 'PX', ceil(reset / 1000) + SLACK)
return {now, v}
