-- Each of ARGV is one decision: u a b c op cost at now unit p1 to p8 keep and, where there is a tail, its numbers behind a 't'.
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local call, list, format, concat, args = pcall, ARGV, string.format, table.concat, {}
local answers = {}
local function text(n)
  if type(n) ~= 'number' then return type(n) end
  return format('%.17g', n)
end
local function decide(kernel, line)
  local n, tail, given = {}, nil, nil
  for word in line:gmatch('%S+') do
    if word == 't' then
      tail, given = {}, {}
    elseif tail then
      tail[#tail + 1], given[#given + 1] = word + 0, word + 0
    else
      n[#n + 1] = word + 0
    end
  end
  local ok, allowed, changed, reset, u, a, b, c, out, taken = call(kernel, n[1], n[2], n[3], n[4], tail, n[5], n[6], n[7], n[8],
    n[9], n[10], n[11], n[12], n[13], n[14], n[15], n[16], n[17], n[18])
  if not ok then return 'error ' .. allowed end
  if tail then
    local same = #tail == #given
    for i = 1, #given do same = same and tail[i] == given[i] end
    if not same then return 'changed the table tail' end
  end
  if allowed == nil and not changed then return 'nothing decided' end
  local answer = {allowed and 'allowed' or 'denied', changed and 'written' or 'unwritten', text(reset)}
  if changed then
    for _, x in ipairs({text(u), text(a), text(b), text(c)}) do answer[#answer + 1] = x end
    for i = 1, #(out or {}) do answer[#answer + 1] = text(out[i]) end
  end
  if allowed and n[5] >= 6 and n[5] ~= 8 then answer[#answer + 1] = 'taken ' .. text(taken) end
  -- Some servers cannot join thousands at once.
  local parts = {}
  for i = 1, #answer, 1024 do parts[#parts + 1] = concat(answer, ' ', i, min(i + 1023, #answer)) end
  return concat(parts, ' ')
end
local function kernel(u, a, b, c, tail, op, cost, at, now, unit, p1, p2, p3, p4, p5, p6, p7, p8, keep)
  local redis, KEYS, ARGV, os = nil, nil, nil, nil
  KERNEL
end
for i = 1, #list do answers[i] = decide(kernel, list[i]) end
return answers
