-- Charges that go in one call: single charges, each decided by itself, and then lists, each granted or denied
-- as a whole, in order.
--
-- KEYS: the keys of the charges, each once; and then the keys of the lists' request ids, in the order of the lists.
-- ARGV: the number of keys of charges, and the number of lists. For every run of keys with the same numbers:
-- header, numbers, and length of the run; then for each of its keys the single charges, in order: the cost of
-- one take, or 'op cost at times' for each of several, with the floor behind at, as '+floor', unless it is 0; or ''. Then each
-- list: key, op, cost and at of each of its charges, as numbers of 7 bytes, with op 256 higher of a shadow, 512 higher of the
-- first charge of a further alternative, of which the first that fits is charged, and 1024 higher where the floor follows. A list
-- with a request id begins with '#', and behind it stands the beginning of the record of its grant, see grant.go: 16 bytes, a
-- byte more if the record ends with a number for each charge, or '' if no record is made.
--
-- The reply is the time, how many single charges changed a state and how many lists were granted (their
-- sum), the states as they were, where 0 stands for a key that holds no string, and for each request id its record, 0 for
-- no string, or nil if the list was decided: then a list behind it with the same id finds the record of its grant.
local pcall, byte, gmatch = redis.pcall, string.byte, string.gmatch
HELPERS
-- numbers returns the unit and p1 to p8 of a limit.
local function numbers(packed)
  if #packed > FEW then return unpack(MORE, packed) end
  local unit, p1, p2, p3, p4, p5, p6 = unpack(NUMBERS, packed)
  return unit, p1, p2, p3, p4, p5, p6, 0, 0
end
local A, K = ARGV, KEYS
local n, lists = A[1] + 0, A[2] + 0
local reply, values, lifetimes, changes = {now, 0, nil, nil, nil, nil}, {nil, nil, nil, nil}, {nil, nil, nil, nil}, 0
-- For the lists, a table for each key: its state, without a unit if it has none that can be read; its run of keys; and whether
-- a list changed the state. A run is its header, unit, kernel and p1 to p8. Few tables are made, and each with room for
-- its size, or for a list's few keys: to make and to grow one costs as much as a decision.
local states = {nil, nil, nil, nil}
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
  local run = lists > 0 and {h, unit, kernel, p1, p2, p3, p4, p5, p6, p7, p8}
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
    local asked = A[j]
    if u and asked ~= '' then
      local changed, reset, _ = false
      if asked ~= before then before, cost = asked, tonumber(asked) end
      if cost then
        _, changed, reset, u, a, b, c, tail = kernel(u, a, b, c, tail, 0, cost, 0, now, unit, p1, p2, p3, p4, p5, p6, p7, p8, 0, floor, ceil, min, max)
        if changed then changes = changes + 1 end
      else
        for op, cost, at, keep, times in gmatch(asked, '(%d+) (%d+) (%d+)%+?(%d*) (%d+)') do
          op, cost, at, keep = op + 0, cost + 0, at + 0, (tonumber(keep) or 0)
          for _ = 1, times + 0 do
            local _, wrote, after
            _, wrote, after, u, a, b, c, tail = kernel(u, a, b, c, tail, op, cost, at, now, unit, p1, p2, p3, p4, p5, p6, p7, p8, keep, floor, ceil, min, max)
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
    if run then states[k] = {u, a, b, c, run, false, tail} end
    j = j + 1
  end
end
local granted, ids = 0, {} -- lists; the numbers in KEYS of request ids with a new record
local lapses, known = {}, {} -- of these; the records of ids, by key, false for none
if lists > 0 then
  -- decide asks the kernel of a key's rule.
  local function decide(k, op, cost, at, keep)
    local s = states[k]
    local r = s[5]
    return r[3](s[1], s[2], s[3], s[4], s[7], op, cost, at, now, r[2], r[4], r[5], r[6], r[7], r[8], r[9], r[10], r[11], keep,
      floor, ceil, min, max)
  end
  -- value returns the bytes of a key's state.
  local function value(k)
    local v, s = values[k], states[k]
    if s[6] then
      local r, u, c, tail = s[5], s[1], s[4], s[7]
      if u ~= r[2] or tail then
        v = encode(r[1], u, s[2], s[3], c, tail)
      elseif c > 0 then
        v = r[1] .. pack('>I7I7I7', s[2], s[3], c)
      else
        v = r[1] .. pack('>I7I7', s[2], s[3])
      end
      values[k], s[6] = v, false
    elseif v == nil then
      v = reply[k + 2]
    end
    return v or ''
  end
  local id, size, length, stamp = n, -1 -- the last of KEYS that was used; the length of a state, and its bytes; those of now
  local parts = {0, 0, 0, 0, 0, 0, 0, 0} -- of a record
  local charges = {0, 0, 0, 0} -- of a list: key, op, cost, at, and the kernel's answers
  for _ = 1, lists do
    local asked, i, head, record = A[j], 1
    j = j + 1
    if byte(asked) == 35 then
      head, i, id = A[j], 2, id + 1
      j = j + 1
      record = known[K[id]]
      if record == nil then
        record = pcall('GET', K[id])
        known[K[id]] = record
      end
      reply[id + 2] = type(record) == 'table' and 0 or record
    end
    if not record then
      local m, all, sound, lapse, last = 0, true, true, now, #asked
      local first, from, to = 1 -- of the charges of an alternative; of those that are made
      while i < last do
        local k, op, cost, at = unpack('>I7I7I7I7', asked, i)
        local shadow, keep = false, 0
        i = i + 28
        if op >= 256 then
          if op >= 1024 then
            keep = unpack('>I7', asked, i)
            op, i = op - 1024, i + 7
          end
          if op >= 512 then
            if all and not from then from, to = first, m end
            first, all, op = m + 1, true, op - 512
          end
          shadow = op >= 256
          if shadow then op = op - 256 end
        end
        if op >= 8 and at > lapse then lapse = at end
        m = m + 1
        local s = states[k]
        if s[1] then
          local late = op == 8 and head and now - at >= IDWINDOW * 1000 -- the id may have been granted, and be forgotten
          local ok, wrote, reset, u, a, b, c, tail, mark
          if late then
            ok, wrote, reset, u, a, b, c, tail, mark = decide(k, 1, 0, 0, 0)
          else
            ok, wrote, reset, u, a, b, c, tail, mark = decide(k, op, cost, at, keep)
          end
          if ok == nil then sound = false end -- the numbers do not serve for now, see moving.go
          if late then ok = false end
          all = all and (ok or shadow)
          charges[m] = {k, op, cost, at, ok, wrote, reset, u, a, b, c, tail, mark}
        else
          sound = false
        end
      end
      if all and not from then from, to = first, m end
      if sound then
        if from then
          granted = granted + 1
          if head and head ~= '' then
            local marked, count = #head > 16, 2
            stamp = stamp or pack('>I7', now)
            parts[1], parts[2] = marked and sub(head, 1, 16) or head, stamp
            for l = 1, m do
              local k, again = charges[l][1], false
              for o = 1, first > 1 and l - 1 or 0 do again = again or charges[o][1] == k end -- a key of two alternatives
              if not again then
                local v = value(k)
                if #v ~= size then size, length = #v, pack('>I7', #v) end
                parts[count + 1], parts[count + 2] = length, v
                count = count + 2
              end
            end
            for l = 1, marked and m or 0 do
              local mark, x = 0, charges[l]
              if from <= l and l <= to then mark = x[5] and 2 + (x[2] >= 6 and x[13] or 0) or 1 end
              count = count + 1
              parts[count] = pack('>I7', mark)
            end
            known[K[id]] = table.concat(parts, '', 1, count)
            ids[#ids + 1], lapses[id] = id, lapse
          end
        else
          -- A denied list changes nothing, but a state ahead of the clock is moved to it.
          for l = 1, m do
            local k, op, cost, at = charges[l][1], charges[l][2], charges[l][3], charges[l][4]
            charges[l] = {k, op, cost, at, decide(k, 1, op <= 1 and cost or 0, at, 0)}
          end
        end
        for l = from or 1, to or m do
          local x = charges[l]
          if x[6] then
            local k, reset = x[1], x[7]
            if not (reset >= 0 and reset < BIG) then error('FLEETQUOTA the kernel returned no time') end
            local s = states[k]
            s[1], s[2], s[3], s[4], s[6], s[7] = x[8], x[9], x[10], x[11], true, x[12]
            lifetimes[k] = ceil(reset / 1000) + SLACK
          end
        end
      end
    end
  end
  for k = 1, n do
    if states[k][6] then value(k) end
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
for _, id in ipairs(ids) do
  local lifetime, lapse = 'IDWINDOW', lapses[id] -- as text: to make one of a number costs a fifth of the call
  if lapse > now then lifetime = IDWINDOW + ceil((lapse - now) / 1000) + 1 end
  call('SET', K[id], known[K[id]], 'PX', lifetime)
end
reply[2] = changes + granted
return reply
