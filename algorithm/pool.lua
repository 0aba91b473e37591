-- pool.Decide. p1 capacity
if op == 6 then cost = max(min(cost, p1 - keep), at) end
return op > 1 and op ~= 6 or cost + keep <= p1, false, 0, 0, 0, 0, 0, nil, cost
