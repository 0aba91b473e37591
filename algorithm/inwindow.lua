-- inWindow, for the rules whose windows have one count. p1 limit; count, most and start of the window; changed
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
  kept = min(kept + min(cost, most), most)
elseif op == 3 then
  if at >= start then kept = max(kept - cost, 0) end
else
  kept, changed = 0, u > 0
end
