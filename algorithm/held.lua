-- held.Decide. p8 is the ttl in µs; pool says that no rule is inside. The rest is the rule's inside, which inner decides.
local slot, was, old = max(floor(p8 / 16), 1), u, tail
local to = now + p8 + slot - 1
to = to - to % slot
if pool then
  if op == 3 then
    at = at + p8 + slot - 1
    op, at, keep = 8, at - at % slot, cost
    cost = 0
  elseif op == 8 then
    cost = 0
  end
end
local changed, head, first, last, sum, inside = false, 0, 1, 0, 0, tail
if tail and tail[1] >= 9007199254740928 then
  local n, from = #tail, 2
  local k = max(min(tail[1] - 9007199254740928, floor((n - 2) / 2)), 0)
  if k > 0 then head, first, last, from = tail[2], 3, 2 + 2 * k, 3 + 2 * k end
  inside = nil
  if from <= n then
    inside = {}
    for i = from, n do inside[i - from + 1] = tail[i] end
  end
  if head - now > 1000000 then
    local moved = {0, 0}
    for i = 3, last, 2 do
      moved[i], moved[i + 1] = max(tail[i] - head + now, 0), tail[i + 1]
    end
    tail, changed = moved, true
  end
  while first < last and tail[first] <= now do first = first + 2 end
  for i = first + 1, last, 2 do sum = sum + tail[i] end
  sum = min(sum, 4503599627370495)
end
if a == 0 and b == 0 and c == 0 and not inside then u = 0 end

local ask, add, less, drop = op, 0, 0, 0
local above = keep
if op <= 1 or op == 6 then
  above = keep + sum
elseif op == 7 then
  ask, above = 1, keep + sum
elseif op == 8 then
  ask, above = 2, 0
elseif op == 9 then
  ask, above = 1, 0
end
local allowed, wrote, reset, taken
allowed, wrote, reset, u, a, b, c, inside, taken = inner(u, a, b, c, inside, ask, cost, at, now, unit, p1, p2, p3, p4, p5, p6, p7, 0, above)
if allowed == nil then return nil, false, 0, was, a, b, c, old, 0 end -- the rule inside has no numbers for this time
if op == 7 then
  taken = to
  if allowed then add = min(cost, 4503599627370495 - sum) end
elseif op >= 8 then
  taken = 0
  if op == 9 then allowed, taken = keep == 0, to end
  for i = first, last, 2 do
    if tail[i] == at then
      if op == 8 then
        drop, less = i, min(keep, tail[i + 1])
      elseif tail[i + 1] >= keep then
        allowed = true
        if to ~= at then drop, less, add = i, keep, keep end
      end
      break
    end
  end
elseif op == 4 then
  changed, first, last = was > 0, 1, 0
elseif pool and op ~= 1 then
  if op == 6 then cost = taken end
  if allowed then add = min(cost, 4503599627370495 - sum) end
end
if not (changed or wrote or add > 0 or less > 0) then
  if first < last then reset = max(reset, tail[last - 1] - now) end
  return allowed, false, reset, was, a, b, c, old, taken
end
local out, n = {0, now}, 2
for i = first, last, 2 do
  local lapse, some = tail[i], tail[i + 1]
  if i == drop then some = some - less end
  if add > 0 and lapse >= to then
    if lapse == to then
      some = min(some + add, 4503599627370495)
    else
      n = n + 2
      out[n - 1], out[n] = to, add
    end
    add = 0
  end
  if some > 0 then
    n = n + 2
    out[n - 1], out[n] = lapse, some
  end
end
if add > 0 then
  n = n + 2
  out[n - 1], out[n] = to, add
end
if n > 128 then -- slots of more than three ttls: the first lapses with the second
  out[6] = min(out[4] + out[6], 4503599627370495)
  table.remove(out, 3)
  table.remove(out, 3)
  n = n - 2
end
if n > 2 then
  out[1] = 9007199254740928 + n / 2 - 1
  reset = max(reset, out[n - 1] - now)
  if u == 0 then u = unit end
elseif inside and inside[1] >= 9007199254740928 then
  out, n = {9007199254740928}, 1
else
  return allowed, true, reset, u, a, b, c, inside, taken
end
if inside then
  for i = 1, #inside do out[n + i] = inside[i] end
end
return allowed, true, reset, u, a, b, c, out, taken
