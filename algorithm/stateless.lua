-- stateless.Decide. p1 1 where every cost is allowed
local need = cost + keep
if op == 6 then need = at + keep end
return op > 1 and op < 5 or need == 0 or p1 == 1, false, 0, 0, 0, 0, 0, nil, p1 * cost
