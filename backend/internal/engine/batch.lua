-- Charges that waited for one call, each decided alone. KEYS: theirs, each once. ARGV: for every run of KEYS
-- with the same numbers header, numbers, and how many they are; then for each of these what is asked, in
-- order: the cost of a take, or 'op cost at times' for each of several. It answers with the time, how many
-- charges changed a state, and the states as they were; 0 stands for what is no text.
HELPERS
local A, K = ARGV, KEYS
local reply, states, lifetimes, changes = {now, 0}, {}, {}, 0
local j, done = 1, 0
while done < #K do
  local h = A[j]
  local n = #h
  local kernel = kernels[sub(h, 2, 1 + byte(h, 1))]
  local unit, p1, p2, p3, p4, p5, p6 = unpack(NUMBERS, A[j + 1])
  local first = done + 1
  done = done + A[j + 2]
  j = j + 3
  for k = first, done do
    local v = pcall('GET', K[k])
    local u, a, b, c, tail = 0, 0, 0, 0
    if v then
      if #v == n + 14 and sub(v, 1, n) == h then
        u = unit
        a, b = unpack('>I7I7', v, n + 1)
        if a >= BIG or b >= BIG then u = nil end
      elseif type(v) == 'table' then
        v, u = 0, nil
      else
        u, a, b, c, tail = decode(v, h)
      end
    end
    reply[k + 2] = v
    if u then
      local todo, changed, reset, _ = A[j], false
      local cost = tonumber(todo)
      if cost then
        _, changed, reset, u, a, b, c, tail = kernel(u, a, b, c, tail, 0, cost, 0, now, unit, p1, p2, p3, p4, p5, p6)
        if changed then changes = changes + 1 end
      else
        for op, cost, at, times in gmatch(todo, '(%d+) (%d+) (%d+) (%d+)') do
          op, cost, at = op + 0, cost + 0, at + 0
          for _ = 1, times do
            local _, wrote, after
            _, wrote, after, u, a, b, c, tail = kernel(u, a, b, c, tail, op, cost, at, now, unit, p1, p2, p3, p4, p5, p6)
            if not wrote then break end -- nor would it the next time
            changed, reset, changes = true, after, changes + 1
          end
        end
      end
      if changed then
        if u == unit and c == 0 and not tail then
          states[k] = h .. pack('>I7I7', a, b)
        else
          states[k] = encode(h, u, a, b, c, tail)
        end
        if not (reset >= 0 and reset < BIG) then error('FLEETQUOTA the kernel returned no time') end
        lifetimes[k] = ceil(reset / 1000) + SLACK
      end
    end
    j = j + 1
  end
end
-- Whatever can fail comes before the first write; a user may lack the right to DEL.
for k = 1, #K do
  if states[k] == false then call('DEL', K[k]) end
end
for k = 1, #K do
  local v = states[k]
  if v then call('SET', K[k], v, 'PX', lifetimes[k]) end
end
reply[2] = changes
return reply
