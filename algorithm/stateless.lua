-- stateless.Decide. p1 1 where every cost is allowed
return op > 1 and op ~= 5 or cost + keep == 0 or p1 == 1, false, 0, 0, 0, 0, 0, nil
