local call, pcall, byte, sub, gmatch = redis.call, redis.pcall, string.byte, string.sub, string.gmatch
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local pack, unpack = struct.pack, struct.unpack
