-- slidingLog.Decide. p1 limit, p2 window, p3 the largest sum, p4 the most entries
local log = tail or {}
local changed, n, joined = false, #log - #log % 2, c
if n > 0 and log[n - 1] - now > 1000000 then
  local moved, by = {}, now - log[n - 1]
  for i = 1, n, 2 do moved[i], moved[i + 1] = log[i] + by, log[i + 1] end
  if c > 0 then joined = max(c + by, 0) end
  changed, log, tail, c = true, moved, moved, joined
end
-- Entries from first to n are in the window.
local sum, first = a, 1
if n > 0 and now - log[n - 1] >= p2 then first = n + 1 end
while first < n and now - log[first] >= p2 do
  sum = sum - log[first + 1]
  first = first + 2
end
sum = min(max(sum, 0), p3)
if first > n then sum = 0 end

local step = ceil(p2 / (p4 / 2 - 1))
if op == 6 then
  cost = max(min(cost, p1 - sum - keep), at)
  op = 0
end
local allowed, total, more, drop = true, sum, 0, 0
if op <= 1 then
  local need = cost + keep
  if need > p1 or sum + need > p1 then
    allowed = false
  elseif op == 0 then
    more = cost
  end
elseif op == 2 then
  more = min(cost, p3 - sum)
elseif op == 3 and cost > 0 then
  for i = first, n, 2 do
    if log[i] >= at then
      if log[i] == at or at <= joined and at >= log[i] - log[i] % step then drop = i end
      break
    end
  end
elseif op == 4 then
  changed, total, first = u > 0, 0, n + 1
end
local function copy()
  local new = {}
  for i = first, n do new[#new + 1] = log[i] end
  return new
end
local next = log
if more > 0 then
  total = sum + more
  if first < n and log[n - 1] >= now then
    next = copy()
    next[#next] = next[#next] + more
  elseif n - first + 1 < 2 * p4 then
    next = copy()
    next[#next + 1] = now
    next[#next + 1] = more
  else
    -- A full log joins the entries of each step.
    local k, most, from = 0, 2 * p4 - 2, nil
    next, joined = {}, log[n - 1]
    for i = first, n, 2 do
      local begin = log[i] - log[i] % step
      if k > 0 and (begin == from or k == most) then
        next[k - 1], next[k] = log[i], next[k] + log[i + 1]
      else
        next[k + 1], next[k + 2] = log[i], log[i + 1]
        k = k + 2
      end
      from = begin
    end
    next[k + 1], next[k + 2] = now, more
  end
  first, n = 1, #next
elseif drop > 0 then
  next = copy()
  local i = drop - first + 1
  if cost < next[i + 1] then
    next[i + 1], total = next[i + 1] - cost, max(sum - cost, 0)
  else
    total = max(sum - next[i + 1], 0)
    table.remove(next, i + 1)
    table.remove(next, i)
  end
  first, n = 1, #next
end
if total ~= sum or op == 4 then
  changed = changed or total ~= sum
  if first > n then
    u, a, b, c, tail = 0, 0, 0, 0, nil
  else
    if next[first] > joined then joined = 0 end
    u, a, b, c, tail = 1, total, 0, joined, next
  end
end
local reset = 0
if first <= n then reset = next[n - 1] + p2 - now end
return allowed, changed, reset, u, a, b, c, tail, cost
