-- decode returns the state that v holds, of the rule in the header h: its unit, a, b, c and tail. Each number
-- has 7 bytes; c and tail are left out if they are zero. It returns nil if no kernel wrote v: numbers from
-- 2^53 on are not exact.
local function decode(v, h)
  local n, u = #h
  local more = #v - n - 14
  if more < 0 or more % 7 > 0 or more > MOST then return end
  if sub(v, 1, n) ~= h then
    if sub(v, 1, n - 7) ~= sub(h, 1, n - 7) then return end
    u = unpack('>I7', v, n - 6)
    if u == 0 or u >= BIG then return end
  end
  local c, tail, a, b = 0, nil, unpack('>I7I7', v, n + 1)
  if a >= BIG or b >= BIG then return end
  if more > 0 then
    c = unpack('>I7', v, n + 15)
    if c >= BIG then return end
    if more > 7 then
      tail = {}
      for i = n + 22, #v, 7 do
        local x = unpack('>I7', v, i)
        if x >= BIG then return end
        tail[#tail + 1] = x
      end
    end
  end
  return u or unpack('>I7', h, n - 6), a, b, c, tail
end

-- encode returns the bytes of a state, or false for a fresh state.
local function encode(h, u, a, b, c, tail)
  if u == 0 then return false end
  local v = pack('>I7I7', a, b)
  if c > 0 or tail then
    v = v .. pack('>I7', c)
    if tail then
      local t = {}
      for i = 1, #tail do t[i] = pack('>I7', tail[i]) end
      -- Some servers cannot join thousands at once.
      for i = 1, #t, 1024 do v = v .. table.concat(t, '', i, min(i + 1023, #t)) end
    end
  end
  if u ~= unpack('>I7', h, #h - 6) then h = sub(h, 1, #h - 7) .. pack('>I7', u) end
  return h .. v
end
