-- stateless.Decide. p1 1 where every cost is allowed
return op > 1 or cost == 0 or p1 == 1, false, 0, 0, 0, 0, 0, nil
