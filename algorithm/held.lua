-- held.Decide. p8 is the ttl in µs; pool says that no rule is inside. The rest is the rule's inside, which inner decides.
local slot, was, old = max((p8 - p8 % 16) / 16, 1), u, tail
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
local changed, first, last, sum, inside = false, 1, 0, 0, tail
if tail and tail[1] >= 9007199254740928 then
  local n, from, k = #tail, 2, tail[1] - 9007199254740928
  if 2 + 2 * k > n then k = floor((n - 2) / 2) end
  if k > 0 then first, last, from = 3, 2 + 2 * k, 3 + 2 * k end
  inside = nil
  if from <= n then
    inside = {}
    for i = from, n do inside[i - from + 1] = tail[i] end
  end
  if k > 0 and tail[2] - now > 1000000 then
    local moved, head = {0, 0}, tail[2]
    for i = 3, last, 2 do
      moved[i], moved[i + 1] = max(tail[i] - head + now, 0), tail[i + 1]
    end
    tail, changed = moved, true
  end
  while first < last and tail[first] <= now do first = first + 2 end
  for i = first + 1, last, 2 do sum = sum + tail[i] end
  if sum > 4503599627370495 then sum = 4503599627370495 end
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
-- The pairs go to a new table, which has room for some from the start: to grow it costs more than to fill it.
local out, n = nil, 2
if last - first < 6 then
  out = {0, now, nil, nil, nil, nil, nil, nil}
else
  out = {0, now, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil}
end
for i = first, last do
  n = n + 1
  out[n] = tail[i]
end
if less > 0 then
  local i = drop - first + 3
  out[i + 1] = out[i + 1] - less
  if out[i + 1] <= 0 then
    for j = i + 2, n do out[j - 2] = out[j] end
    out[n - 1], out[n] = nil, nil
    n = n - 2
  end
end
if add > 0 then
  local i = n - 1
  while i > 2 and out[i] > to do i = i - 2 end
  if i > 2 and out[i] == to then
    out[i + 1] = min(out[i + 1] + add, 4503599627370495)
  else
    for j = n, i + 2, -1 do out[j + 2] = out[j] end
    out[i + 2], out[i + 3] = to, add
    n = n + 2
  end
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
