-- fixedWindow.Decide. p1 limit, p2 most, p3 1 where windows begin at a first charge, p4 offset
local most, changed, start, length, count = p2, false, now, unit, 0
if p3 == 0 then start = max(now - (now - p4) % unit, 0) end
if u > 0 then
  if a - now > 1000000 then
    changed, a = true, now
    if p3 == 0 then a = max(now - (now - p4) % u, 0) end
  end
  if b > 0 and now < a + u then start, length, count = a, u, min(b, most) end
end
INWINDOW
if kept ~= count then
  if kept > count and length ~= unit then
    start, length = max(now, start), unit
    if p3 == 0 then start = max(start - (start - p4) % unit, 0) end
  end
  changed, u, a, b, c, tail = true, length, start, kept, 0, nil
  if kept == 0 then u, a, b = 0, 0, 0 end
elseif op == 4 then
  u, a, b, c, tail = 0, 0, 0, 0, nil
end
local reset = 0
if kept > 0 then reset = start + length - now end
return allowed, changed, reset, u, a, b, c, tail, cost
