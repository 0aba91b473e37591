-- calendar.Decide. p1 limit, p2 to p5 the boundaries of three windows, see ParamsAt. Elsewhere it decides nothing.
if now < p2 or now >= p5 - 1000000 then return nil, false, 0, u, a, b, c, tail, 0 end
local function window(t)
  if t >= p4 then return p4, p5 end
  if t >= p3 then return p3, p4 end
  return p2, p3
end
local most, changed, count = 4503599627370495, false, 0
local start, fin = window(now)
local length = fin - start
if u > 0 then
  if a - now > 1000000 then changed, a, c = true, start, fin end
  if b > 0 and now < c then start, fin, count = a, c, min(b, most) end
end
INWINDOW
if kept ~= count then
  local is = fin - start
  if kept > count and count > 0 and (is > 2 * length or 2 * is < length) then
    start, fin = window(max(now, start))
  end
  changed, u, a, b, c, tail = true, 1, start, kept, fin, nil
  if kept == 0 then u, a, b, c = 0, 0, 0, 0 end
elseif op == 4 then
  u, a, b, c, tail = 0, 0, 0, 0, nil
end
local reset = 0
if kept > 0 then reset = fin - now end
return allowed, changed, reset, u, a, b, c, tail, cost
