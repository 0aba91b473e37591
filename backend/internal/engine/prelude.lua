local call, sub = redis.call, string.sub
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local struct = rawget(_G, 'struct')
if not struct then
  -- A server without the library, such as miniredis: the same for runs of whole numbers of 7 bytes, big-endian.
  local byte, char, concat, spread = string.byte, string.char, table.concat, rawget(_G, 'unpack') or table.unpack
  struct = {}
  function struct.pack(_, ...)
    local numbers, bytes = {...}, {}
    for i = 1, #numbers do
      local x = numbers[i] + 0
      if x < 0 then x = ceil(x) else x = floor(x) end
      local b = {}
      for j = 7, 1, -1 do
        b[j] = x % 256
        x = (x - b[j]) / 256
      end
      bytes[i] = char(spread(b))
    end
    return concat(bytes)
  end
  function struct.unpack(format, v, at)
    at = at or 1
    local signed, numbers = sub(format, 2, 2) == 'i', {}
    for i = 1, (#format - 1) / 2 do
      local x = byte(v, at)
      if signed and x >= 128 then x = x - 256 end
      for j = at + 1, at + 6 do x = x * 256 + byte(v, j) end
      numbers[i] = x
      at = at + 7
    end
    return spread(numbers)
  end
end
local pack, unpack = struct.pack, struct.unpack
