local call, byte, char, sub = redis.call, string.byte, string.char, string.sub
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local pack, unpack = struct.pack, struct.unpack
