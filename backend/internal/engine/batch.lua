-- Charges that go in one call: single charges, each decided by itself, and then lists, each granted or denied
-- as a whole, in order.
--
-- KEYS: the keys of the charges, each once; and then the keys of the lists' request ids, in the order of the lists.
-- ARGV: the number of keys of charges, and the number of lists. For every run of keys with the same numbers:
-- header, numbers, and length of the run; then for each of its keys the single charges, in order: the cost of
-- one take, or 'op cost at times' for each of several, or ''. Then each list: 'key op cost at' for each of its charges,
-- with op 16 higher of a shadow, and 32 higher of the first charge of a further alternative, of which the first that fits is
-- charged. Behind at comes the floor, as '+floor', unless it is 0. A list with a request id begins with '#', and behind it
-- stands the beginning of the record of its grant, see grant.go: 16 bytes, a byte more if the record ends with a number for
-- each charge, or '' if no record is made.
--
-- The reply is the time, how many single charges changed a state and how many lists were granted (their
-- sum), the states as they were, where 0 stands for a key that holds no string, and for each request id its record, 0 for
-- no string, or nil if the list was decided: then a list behind it with the same id finds the record of its grant.
HELPERS
-- numbers returns the unit and p1 to p8 of a limit.
local function numbers(packed)
  if #packed > FEW then return unpack(MORE, packed) end
  local unit, p1, p2, p3, p4, p5, p6 = unpack(NUMBERS, packed)
  return unit, p1, p2, p3, p4, p5, p6, 0, 0
end
local A, K = ARGV, KEYS
local n, lists = A[1] + 0, A[2] + 0
local reply, values, lifetimes, changes = {now, 0}, {}, {}, 0
local states, runs = {}, {} -- of the keys, for the lists
-- The states of several keys come by one command. It shows no difference between a key that holds no string and one that is
-- not there, and a user may lack the right to it: where it found nothing, GET is asked.
local found = n > 1 and n <= 1000 and pcall('MGET', (rawget(_G, 'unpack') or table.unpack)(K, 1, n)) or {}
local j, done = 3, 0
local before, cost -- an argument of single charges, most of which are alike, and its number
local kernels = {} -- those that are used: to build one costs as much as a decision
while done < n do
  local h = A[j]
  local size = #h
  local rule = sub(h, 2, 1 + byte(h, 1))
  local kernel = kernels[rule]
  if not kernel then
    kernel = kernelOf(rule)
    kernels[rule] = kernel
  end
  local unit, p1, p2, p3, p4, p5, p6, p7, p8 = numbers(A[j + 1])
  local run = lists > 0 and {h = h, kernel = kernel, numbers = A[j + 1]}
  local first = done + 1
  done = done + A[j + 2]
  j = j + 3
  for k = first, done do
    local v = unit > 0 and (found[k] or pcall('GET', K[k])) -- a rule of unit 0 keeps no state: that of another rule stays
    local u, a, b, c, tail = 0, 0, 0, 0
    if v then
      local rest = #v - size
      if (rest == 21 or rest == 14) and sub(v, 1, size) == h then
        u = unit
        if rest == 21 then
          a, b, c = unpack('>I7I7I7', v, size + 1)
        else
          a, b = unpack('>I7I7', v, size + 1)
        end
        if a >= BIG or b >= BIG or c >= BIG then u = nil end
      elseif type(v) == 'table' then
        v, u = 0, nil
      else
        u, a, b, c, tail = decode(v, h)
      end
    end
    reply[k + 2] = v
    if u then
      local asked, changed, reset, _ = A[j], false
      if asked ~= before then before, cost = asked, tonumber(asked) end
      if cost then
        _, changed, reset, u, a, b, c, tail = kernel(u, a, b, c, tail, 0, cost, 0, now, unit, p1, p2, p3, p4, p5, p6, p7, p8, 0)
        if changed then changes = changes + 1 end
      else
        for op, cost, at, keep, times in gmatch(asked, '(%d+) (%d+) (%d+)%+?(%d*) (%d+)') do
          op, cost, at, keep = op + 0, cost + 0, at + 0, (tonumber(keep) or 0)
          for _ = 1, times + 0 do
            local _, wrote, after
            _, wrote, after, u, a, b, c, tail = kernel(u, a, b, c, tail, op, cost, at, now, unit, p1, p2, p3, p4, p5, p6, p7, p8, keep)
            if not wrote then break end -- the next charge of the run would change nothing either
            changed, reset, changes = true, after, changes + 1
          end
        end
      end
      if changed then
        if u ~= unit or tail then
          values[k] = encode(h, u, a, b, c, tail)
        elseif c > 0 then
          values[k] = h .. pack('>I7I7I7', a, b, c)
        else
          values[k] = h .. pack('>I7I7', a, b)
        end
        if not (reset >= 0 and reset < BIG) then error('FLEETQUOTA the kernel returned no time') end
        lifetimes[k] = ceil(reset / 1000) + SLACK
      end
    end
    if run then states[k], runs[k] = {u, a, b, c, tail}, run end
    j = j + 1
  end
end
local granted, records = 0, {}
if lists > 0 then
  -- decide returns the kernel's answer to a charge, or nil if the key does not hold a state of its rule.
  local function decide(k, op, cost, at, keep)
    local s, run = states[k], runs[k]
    if not s[1] then return end
    local unit, p1, p2, p3, p4, p5, p6, p7, p8 = numbers(run.numbers)
    return {run.kernel(s[1], s[2], s[3], s[4], s[5], op, cost, at, now, unit, p1, p2, p3, p4, p5, p6, p7, p8, keep)}
  end
  local changed, known = {}, {} -- the keys with states that lists changed; the records of ids, false for none
  -- value returns the bytes of a key's state.
  local function value(k)
    if changed[k] then
      local s = states[k]
      values[k], changed[k] = encode(runs[k].h, s[1], s[2], s[3], s[4], s[5]), nil
    end
    if values[k] ~= nil then return values[k] or '' end
    return reply[k + 2] or ''
  end
  local id = n -- the last of KEYS that was used
  for _ = 1, lists do
    local asked, head, record = A[j], nil, nil
    j = j + 1
    if byte(asked) == 35 then
      head = A[j]
      j = j + 1
      id = id + 1
      record = known[K[id]]
      if record == nil then
        record = pcall('GET', K[id])
        known[K[id]] = record
      end
      reply[id + 2] = type(record) == 'table' and 0 or record
    end
    if not record then
      local charges, new, all, sound = {}, {}, true, true
      local lapse = now
      local first, from, to = 1 -- of the charges of an alternative; of those that are made
      for k, op, cost, at, keep in gmatch(asked, '(%d+) (%d+) (%d+) (%d+)%+?(%d*)') do
        local c = {k + 0, op + 0, cost + 0, at + 0}
        local shadow = c[2] >= 16
        if shadow then
          if c[2] >= 32 then
            if all and not from then from, to = first, #charges end
            first, all, c[2] = #charges + 1, true, c[2] - 32
            shadow = c[2] >= 16
          end
          if shadow then c[2] = c[2] - 16 end
        end
        if c[2] >= 8 and c[4] > lapse then lapse = c[4] end
        local d
        if c[2] == 8 and head and now - c[4] >= IDWINDOW * 1000 then -- the id may have been granted, and be forgotten
          d = decide(c[1], 1, 0, 0, 0)
          if d then d[1] = false end
        else
          d = decide(c[1], c[2], c[3], c[4], tonumber(keep) or 0)
        end
        charges[#charges + 1], new[#new + 1] = c, d or false
        sound = sound and d and d[1] ~= nil -- nil says that the numbers do not serve for now, see moving.go
        all = all and d and (d[1] or shadow)
      end
      if all and not from then from, to = first, #charges end
      if sound then
        if from then
          granted = granted + 1
          if head and head ~= '' then
            local parts, seen = {sub(head, 1, 16), pack('>I7', now)}, {}
            for _, c in ipairs(charges) do
              if not seen[c[1]] then
                seen[c[1]] = true
                local v = value(c[1])
                parts[#parts + 1] = pack('>I7', #v)
                parts[#parts + 1] = v
              end
            end
            for l = 1, #head > 16 and #charges or 0 do
              local mark = 0
              if from <= l and l <= to then mark = new[l][1] and 2 + (charges[l][2] >= 6 and new[l][9] or 0) or 1 end
              parts[#parts + 1] = pack('>I7', mark)
            end
            known[K[id]] = table.concat(parts)
            records[#records + 1] = {K[id], known[K[id]], IDWINDOW + (lapse > now and ceil((lapse - now) / 1000) + 1 or 0)}
          end
        else
          -- A denied list changes nothing, but a state ahead of the clock is moved to it.
          for l, c in ipairs(charges) do
            new[l] = decide(c[1], 1, c[2] <= 1 and c[3] or 0, c[4], 0)
          end
        end
        for l = from or 1, to or #charges do
          local c, d = charges[l], new[l]
          if d[2] then
            if not (d[3] >= 0 and d[3] < BIG) then error('FLEETQUOTA the kernel returned no time') end
            states[c[1]], lifetimes[c[1]] = {d[4], d[5], d[6], d[7], d[8]}, ceil(d[3] / 1000) + SLACK
            changed[c[1]] = true
          end
        end
      end
    end
  end
  for k in pairs(changed) do
    local s = states[k]
    values[k] = encode(runs[k].h, s[1], s[2], s[3], s[4], s[5])
  end
end
-- Everything that can fail comes before the first write; a user may lack the right to DEL.
for k = 1, n do
  if values[k] == false then call('DEL', K[k]) end
end
for k = 1, n do
  local v = values[k]
  if v then call('SET', K[k], v, 'PX', lifetimes[k]) end
end
for _, r in ipairs(records) do call('SET', r[1], r[2], 'PX', r[3]) end
reply[2] = changes + granted
return reply
