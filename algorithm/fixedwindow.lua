-- fixedWindow.Decide. p1 limit, p2 most, p3 1 where windows begin at a first charge, p4 offset
local changed, start, length, count = false, now, unit, 0
if p3 == 0 then start = max(now - (now - p4) % unit, 0) end
if u > 0 then
  if a - now > 1000000 then
    changed, a = true, now
    if p3 == 0 then a = max(now - (now - p4) % u, 0) end
  end
  if b > 0 and now < a + u then start, length, count = a, u, min(b, p2) end
end
if op == 6 then
  cost = max(min(cost, p1 - count - keep), at)
  op = 0
end
local allowed, kept = true, count
if op <= 1 then
  local need = cost + keep
  if need > p1 or count + need > p1 then
    allowed = false
  elseif op == 0 then
    kept = count + cost
  end
elseif op == 2 then
  kept = min(kept + min(cost, p2), p2)
elseif op == 3 then
  if at >= start then kept = max(kept - cost, 0) end
else
  kept, changed = 0, u > 0
end
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
