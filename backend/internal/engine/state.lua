-- decode returns the state that v holds, of the rule in the header h: its unit, a, b, c and tail. Each number
-- has 7 bytes; c and tail are left out if they are zero. It returns nil if no kernel wrote v: numbers from
-- 2^53 on are not exact. A state of a rule that the header's rule reads as its own has a header of another length.
local function decode(v, h)
  local n, u = #h
  local same = sub(v, 1, n) == h
  if not same and sub(v, 1, n - 7) ~= sub(h, 1, n - 7) then
    local name = sub(h, 2, n - 7)
    if name == '' then return
    READS
    else return end
  end
  local more = #v - n - 14
  if more < 0 or more % 7 > 0 or more > MOST then return end
  if not same then
    u = unpack('>I7', v, n - 6)
    if u == 0 or u >= BIG then return end
  end
  local c, tail, a, b = 0, nil, unpack('>I7I7', v, n + 1)
  if a >= BIG or b >= BIG then return end
  if more > 0 then
    c = unpack('>I7', v, n + 15)
    if c >= BIG then return end
    if more > 7 then
      local count, spread = more / 7 - 1, rawget(_G, 'unpack') or table.unpack
      for from = 0, count - 1, 100 do -- in one call for each hundred
        local some = min(count - from, 100)
        local numbers = {unpack(sub(HUNDRED, 1, 1 + 2 * some), v, n + 22 + 7 * from)}
        numbers[some + 1] = nil -- where a next number would begin
        if max(spread(numbers)) >= BIG then return end
        if not tail then
          tail = numbers
        else
          for i = 1, some do tail[from + i] = numbers[i] end
        end
      end
    end
  end
  return u or unpack('>I7', h, #h - 6), a, b, c, tail
end

-- encode returns the bytes of a state, or false for a fresh state.
local function encode(h, u, a, b, c, tail)
  if u == 0 then return false end
  local v = pack('>I7I7', a, b)
  if c > 0 or tail then
    v = v .. pack('>I7', c)
    if tail then
      local t, n, spread = {v}, #tail, rawget(_G, 'unpack') or table.unpack
      for i = 1, n, 100 do
        local last = min(i + 99, n)
        t[#t + 1] = pack(sub(HUNDRED, 1, 3 + 2 * (last - i)), spread(tail, i, last))
      end
      v = table.concat(t)
    end
  end
  if u ~= unpack('>I7', h, #h - 6) then h = sub(h, 1, #h - 7) .. pack('>I7', u) end
  return h .. v
end
