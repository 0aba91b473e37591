-- A number is 7 bytes, the highest first: enough for 2^53.
local function num(v, i)
  local a, b, c, d, e, f, g = byte(v, i, i + 6)
  return (((((a * 256 + b) * 256 + c) * 256 + d) * 256 + e) * 256 + f) * 256 + g
end

local function split(x)
  local lo = x % 16777216
  local hi = (x - lo) / 16777216
  local c, f = hi % 65536, lo % 65536
  local g, d = lo % 256, c % 256
  local a = (hi - c) / 65536
  local b = a % 256
  return (a - b) / 256, b, (c - d) / 256, d, (lo - f) / 65536, (f - g) / 256, g
end

-- decode reads what is behind the header h: a, b and, where they are not zero, c and a tail. It returns
-- nothing for what no kernel wrote: numbers from 2^53 on are not exact.
local function decode(v, h)
  local n, u = #h
  local more = #v - n - 14
  if more < 0 or more % 7 > 0 or more > MOST then return end
  if sub(v, 1, n) ~= h then
    if sub(v, 1, n - 7) ~= sub(h, 1, n - 7) then return end
    u = num(v, n - 6)
    if u == 0 or u >= BIG then return end
  end
  local a, b, c, tail = num(v, n + 1), num(v, n + 8), 0
  if a >= BIG or b >= BIG then return end
  if more > 0 then
    c = num(v, n + 15)
    if c >= BIG then return end
    if more > 7 then
      tail = {}
      for i = n + 22, #v, 7 do
        local x = num(v, i)
        if x >= BIG then return end
        tail[#tail + 1] = x
      end
    end
  end
  return u or num(h, n - 6), a, b, c, tail
end

-- encode returns the bytes of a state, false for a fresh one.
local function encode(h, u, a, b, c, tail)
  if u == 0 then return false end
  local a1, a2, a3, a4, a5, a6, a7 = split(a)
  local v = char(a1, a2, a3, a4, a5, a6, a7, split(b))
  if c > 0 or tail then
    v = v .. char(split(c))
    if tail then
      local t = {}
      for i = 1, #tail do t[i] = char(split(tail[i])) end
      v = v .. table.concat(t)
    end
  end
  if u ~= num(h, #h - 6) then h = sub(h, 1, #h - 7) .. char(split(u)) end
  return h .. v
end
