-- slidingWindow.Decide. p1 limit, p2 most, p3 tick, p4 ticks
local changed = false
local start, length, cur, prev = now - now % unit, unit, 0, 0
if u > 0 then
  if a - now > 1000000 then
    changed, a, b, c = true, now - now % u, min(b + c, 4503599627370495), 0
  end
  if now < a + 2 * u then
    start, length, cur, prev = a, u, min(b, p2), min(c, p2)
    if now >= a + u then
      prev = cur
      start, cur = a + u, 0
    end
  end
end
local used, covered = cur + prev, p4 - ceil(max(now - start, 0) / p3)
if prev > 0 and length == unit then
  local count = ceil(prev * covered / p4) - 1
  if count <= 0 then count, prev = 0, 0 end
  used = cur + count
end
if op == 6 then
  cost = max(min(cost, p1 - used - keep), at)
  op = 0
end
local allowed, more = true, 0
local cur1, prev1 = cur, prev
if op <= 1 then
  local need = cost + keep
  if need > p1 or used + need > p1 then
    allowed = false
  elseif op == 0 then
    more = cost
  end
elseif op == 2 then
  more = max(min(cost, p2 - used), 0)
elseif op == 3 then
  if at >= start then
    cur1 = max(cur - cost, 0)
  elseif at >= start - length then
    prev1 = max(prev - cost, 0)
    if length == unit and ceil(prev1 * covered / p4) <= 1 then prev1 = 0 end
  end
else
  cur1, prev1, changed = 0, 0, u > 0
end
local moved = false
if more > 0 then
  if length ~= unit then
    start = max(now, start)
    start, length, cur1, prev1, moved = start - start % unit, unit, used, 0, true
  end
  cur1 = min(cur1 + more, p2)
end
if moved or cur1 ~= cur or prev1 ~= prev then
  changed, u, a, b, c, tail = true, length, start, cur1, prev1, nil
  if cur1 == 0 and prev1 == 0 then u, a = 0, 0 end
elseif op == 4 then
  u, a, b, c, tail = 0, 0, 0, 0, nil
end
local reset = 0
if length ~= unit then
  if cur1 > 0 then
    reset = start + 2 * length - now
  elseif prev1 > 0 then
    reset = start + length - now
  end
elseif cur1 > 0 or prev1 > 0 then
  local from, count = start, prev1
  if cur1 > 0 then from, count = start + length, cur1 end
  local passed = p4 - floor(p4 / count)
  if passed > 0 then from = from + (passed - 1) * p3 + 1 end
  reset = from - now
end
return allowed, changed, reset, u, a, b, c, tail, cost
