-- One charge. KEYS: the key. ARGV: header, op, cost, at, unit, p1 to p6.
local A = ARGV
local v = call('GET', KEYS[1])
local u, a, b, c, tail = 0, 0, 0, 0
if v then
  u, a, b, c, tail = decode(v, A[1])
  if not u then return foreign end
end
local allowed, changed, reset
allowed, changed, reset, u, a, b, c, tail = kernel(u, a, b, c, tail, A[2] + 0, A[3] + 0, A[4] + 0, now,
  A[5] + 0, A[6] + 0, A[7] + 0, A[8] + 0, A[9] + 0, A[10] + 0, A[11] + 0)
if changed then
  write(KEYS[1], encode(A[1], u, a, b, c, tail), reset)
  return {now, v}
end
return {-now, v}
