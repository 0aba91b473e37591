-- tokenBucket.Decide. p1 credits a tick, p2 capacity, p3 most, p4 tick, p5 fill
local floored = now
if p4 > 1 then floored = now - now % p4 end
local changed, deficit, upto = false, 0, floored
if u > 0 then
  local held, last = a, b
  if u ~= unit then held = min(ceil(held / u), p3 / unit) * unit end
  if last - now > 1000000 then
    last = floored
    if c > floored then c = floored end
    changed, u, a, b, tail = true, unit, held, last, nil
  end
  if p4 > 1 then last = ceil(last / p4) * p4 end
  local elapsed = (floored - last) / p4
  if elapsed < p5 then
    deficit = min(held, p3)
    if elapsed > 0 then deficit = max(deficit - elapsed * p1, 0) end
  end
  if deficit > 0 and last > floored then upto = last end
end
if op == 6 then
  cost = max(min(cost, floor((p2 - deficit) / unit) - keep), at)
  op = 0
end
local allowed, kept = true, deficit
if op <= 1 then
  local need = (cost + keep) * unit
  if need > p2 or deficit + need > p2 then
    allowed = false
  elseif op == 0 then
    kept = deficit + cost * unit
  end
elseif op == 2 then
  kept = min(kept + min(cost * unit, p3), p3)
elseif op == 3 then
  if c > 0 and at >= c or c == 0 and at > now - ceil(max(p2, unit) / p1) * p4 then
    kept = max(kept - min(cost * unit, p3), 0)
  end
elseif op == 4 then
  kept, changed = 0, u > 0
else
  local owed = deficit + cost * unit
  if cost * unit > p2 or owed > p3 or owed > p2 and upto + ceil((owed - p2) / p1) * p4 - now > at then
    allowed = false
  else
    kept = owed
  end
end
if kept ~= deficit then
  changed, u, a, b, tail = true, unit, kept, upto, nil
  if deficit == 0 or c > now then c = now end
  if kept == 0 then u, a, b, c = 0, 0, 0, 0 end
elseif op == 4 then
  u, a, b, c, tail = 0, 0, 0, 0, nil
end
local reset = 0
if kept > 0 then reset = upto + ceil(kept / p1) * p4 - now end
return allowed, changed, reset, u, a, b, c, tail, cost
