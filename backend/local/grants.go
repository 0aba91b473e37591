package local

import (
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// grants are a part of the request ids, chosen by their hashes, each with the grant of its call. They have a lock of their
// own, which a call takes before the locks of its keys.
//
// The records stand one behind the other in a log of pages, in the order in which they are due: a call writes its record at the
// tail, and forgets some that are due at the head. So a grant takes one copy and one entry of the index, whatever its length,
// and the garbage collector does not look into it. A record is due after quota.IDWindow. If its id has to be remembered for
// longer, it moves to the tail then; so the room of such an id may come free later, by quota.IDWindow at most.
type grants struct {
	mu         sync.Mutex
	index      []uint64     // 31 bits of hash, above them a 1, and a place in the log, in words; 0 is empty
	live       int          // entries
	head, tail uint64       // of the log, in bytes; both are 0 if the log is empty
	pages      []*page      // of the log, from the head's to the tail's
	due        quota.Micros // of the record at the head; 0 if it was not read

	old   []uint64 // the index that index replaces, until moveOn has moved its entries
	place int      // the entries of the places of old before it are in index
}

type page [1024]byte

// A record begins with four words: when it is due; the time of the decisions; the tag of its index entry, or 0 if it has none any
// more, and its size in bytes; and the class of its group, and the sizes of its key and of its charges. Behind them are the
// key, which is the group and the id, and the charges, as appendCharges writes them; and as varints how much longer than
// quota.IDWindow it has to be remembered, and the numbers of the decisions: a byte that tells which are not 0, and these. Its
// size is a multiple of the word's.
const (
	word       = 8
	headerSize = 4 * word
)

// request is a call with a request id.
type request struct {
	hash         uint64
	class        uint64
	key, charges int    // their sizes
	record       []byte // the header, which is not filled in, the key and the charges
	peeks        bool   // no charge has an effect, so the grant is not remembered
	granted      bool   // the grant has to be remembered, and has its room
}

// request describes the call of some charges. It writes the record to dst.
func (s *Store) request(dst []byte, cs []quota.Charge) request {
	group := quota.Group(cs[0].Key)
	dst = append(dst, make([]byte, headerSize)...)
	dst = append(append(append(dst, group...), '/'), cs[0].ID...) // a group has no slash
	r := request{hash: maphash.Bytes(s.seed, dst[headerSize:]), class: s.classOf(group), key: len(dst) - headerSize, peeks: driver.OnlyPeeks(cs)}
	r.record = appendCharges(dst, cs)
	r.charges = len(r.record) - headerSize - r.key
	return r
}

// takeRoom takes the room for a request's id if its grant has to be remembered, and reports false if there is none.
func (s *Store) takeRoom(r *request, granted bool) bool {
	if !granted || r.peeks {
		return true
	}
	r.granted = s.ids.take(r.class)
	return r.granted
}

// tryOnce is tryAll for a call with a request id, whose grant it repeats or remembers.
func (s *Store) tryOnce(r *request, cs []quota.Charge, hashes []uint64, set *shardSet, out []quota.Decision) (now quota.Micros, full *room, err error) {
	t := &s.grants[r.hash%shardCount]
	t.mu.Lock()
	defer t.mu.Unlock() // the clock and the algorithms may panic
	if at, ok := t.find(r); ok {
		if now = s.now(); t.expires(at) > now {
			err = t.repeat(at, r, cs, out)
			t.tidy(grantsEach, now, &s.ids)
			if sh := &s.shards[hashes[0]%shardCount]; sh.mu.TryLock() {
				sh.tidy(now, s)
				sh.mu.Unlock()
			}
			return now, nil, err
		}
		t.forget(at, &s.ids)
	}
	r.granted = false
	if now, full, err = s.tryAll(cs, hashes, r, set, out); full == nil {
		if r.granted {
			t.remember(r, cs, now, out)
		}
		t.tidy(grantsEach, now, &s.ids)
	}
	return now, full, err
}

// grantsEach is how many records a call with a request id looks at: faster than they can come.
const grantsEach = 4

// find returns the place of a request's record.
func (t *grants) find(r *request) (at uint64, ok bool) {
	if at, ok = t.findIn(t.index, r); !ok && t.old != nil {
		at, ok = t.findIn(t.old, r)
	}
	return at, ok
}

func (t *grants) findIn(index []uint64, r *request) (at uint64, ok bool) {
	if len(index) == 0 {
		return 0, false
	}
	mask, tag := uint64(len(index)-1), grantTag(r.hash)
	for i := tag & mask; index[i] != 0; i = (i + 1) & mask {
		if index[i]>>32 != tag {
			continue
		}
		// The log is shorter than the places of an entry can tell apart.
		at := t.head + uint64(uint32(index[i])-uint32(t.head/word))*word
		if _, key, _ := t.sizes(at); key == r.key && t.holds(at+headerSize, r.record[headerSize:headerSize+key]) {
			return at, true
		}
	}
	return 0, false
}

func grantTag(h uint64) uint64 { return h>>32 | 1<<31 }

// entry returns the index entry of the record at a place, which has one.
func (t *grants) entry(at uint64) uint64 { return t.word(at+2*word)<<32 | uint64(uint32(at/word)) }

// sizes returns the class of a record's group, and the sizes of its key and its charges.
func (t *grants) sizes(at uint64) (class uint64, key, charges int) {
	w := t.word(at + 3*word)
	return w >> 48, int(w >> 32 & 0xffff), int(uint32(w))
}

// expires returns the time until which the record at a place has to be remembered.
func (t *grants) expires(at uint64) quota.Micros {
	_, key, charges := t.sizes(at)
	var few [binary.MaxVarintLen64]byte
	from := at + headerSize + uint64(key+charges)
	longer, _ := binary.Varint(t.read(few[:0], from, min(len(few), int(t.tail-from))))
	return quota.Micros(int64(t.word(at+word))+longer) + window + 1
}

const window = quota.Micros(quota.IDWindow / time.Microsecond)

// repeat writes the decisions of the record at a place to out. It fails with ErrInvalid where other charges were granted.
func (t *grants) repeat(at uint64, r *request, cs []quota.Charge, out []quota.Decision) error {
	_, key, charges := t.sizes(at)
	if charges != r.charges || !t.holds(at+headerSize+uint64(key), r.record[headerSize+key:]) {
		return fmt.Errorf("local: %w: request id %q was granted to other charges; accepted: a new id", quota.ErrInvalid, cs[0].ID)
	}
	var few [128]byte
	text := t.read(few[:0], at, int(t.word(at+2*word)>>32))[headerSize+key+charges:]
	_, size := binary.Varint(text)
	text = text[size:]
	for i := range out {
		d := &out[i]
		*d = quota.Decision{Replayed: true, Shadow: cs[i].Shadow, Alternative: cs[i].Alternative, At: quota.Micros(t.word(at + word))}
		set := text[0]
		text = text[1:]
		for j, n := range [...]*int64{&d.Capacity, &d.Remaining, &d.Charged, (*int64)(&d.ResetAfter), (*int64)(&d.Delay), (*int64)(&d.RetryAfter), &d.Held, (*int64)(&d.Until)} {
			if set>>j&1 == 1 {
				*n, size = binary.Varint(text)
				text = text[size:]
			}
		}
		d.Allowed = d.RetryAfter == 0
	}
	return nil
}

// remember keeps the grant of a request, which has no record.
func (t *grants) remember(r *request, cs []quota.Charge, now quota.Micros, ds []quota.Decision) {
	record := binary.AppendVarint(r.record, int64(quota.Micros(driver.IDLifetime(cs, now)/time.Microsecond)-window))
	for i := range ds {
		d := &ds[i]
		set := len(record)
		record = append(record, 0)
		for j, n := range [...]int64{d.Capacity, d.Remaining, d.Charged, int64(d.ResetAfter), int64(d.Delay), int64(d.RetryAfter), d.Held, int64(d.Until)} {
			if n != 0 {
				record[set] |= 1 << j
				record = binary.AppendVarint(record, n)
			}
		}
	}
	for len(record)%word != 0 {
		record = append(record, 0)
	}
	header := record[:headerSize]
	binary.LittleEndian.PutUint64(header, uint64(now+window+1))
	binary.LittleEndian.PutUint64(header[word:], uint64(now))
	binary.LittleEndian.PutUint64(header[2*word:], uint64(len(record))<<32|grantTag(r.hash))
	binary.LittleEndian.PutUint64(header[3*word:], r.class<<48|uint64(r.key)<<32|uint64(r.charges))
	if 4*(t.live+1) > 3*len(t.index) {
		for t.old != nil {
			t.moveOn(len(t.old))
		}
		t.resize(max(16, 2*len(t.index)))
	}
	t.live++
	link(t.index, t.entry(t.write(record)))
}

// tidy looks at some records at the head of the log, of which it forgets those that may be forgotten, and moves entries of the old
// index. It reports whether it forgot a record.
func (t *grants) tidy(looks int, now quota.Micros, r *room) (freed bool) {
	t.moveOn(4 * looks)
	for ; looks > 0 && t.head < t.tail && t.due <= now; looks-- { // the head's record is in no cache
		at := t.head
		size := int(t.word(at+2*word) >> 32)
		if linked := uint32(t.word(at+2*word)) != 0; linked {
			if due := quota.Micros(t.word(at)); due > now {
				t.due = due
				break
			}
			if t.expires(at) > now {
				var few [512]byte
				record, entry := t.read(few[:0], at, size), t.locate(t.entry(at))
				binary.LittleEndian.PutUint64(record, uint64(now+window+1))
				*entry = t.entry(t.write(record))
			} else {
				t.forget(at, r)
				freed = true
			}
		}
		t.drop(size)
	}
	if 8*t.live < len(t.index) && len(t.index) > 16 && t.old == nil {
		t.resize(len(t.index) / 2)
	}
	return freed
}

// forget removes the entry of the record at a place, and gives its room back.
func (t *grants) forget(at uint64, r *room) {
	class, _, _ := t.sizes(at)
	r.give(class)
	r.given.Add(1)
	e := t.entry(at)
	if i, ok := placeOf(t.index, e); ok {
		unlink(t.index, i)
	} else {
		i, _ = placeOf(t.old, e)
		unlink(t.old, i)
	}
	t.live--
	mark := t.bytes(at + 2*word)
	binary.LittleEndian.PutUint32(mark, 0)
}

// locate returns the place of an entry.
func (t *grants) locate(e uint64) *uint64 {
	if i, ok := placeOf(t.index, e); ok {
		return &t.index[i]
	}
	i, _ := placeOf(t.old, e)
	return &t.old[i]
}

// resize gives the index another size, a power of two. The index must not be changing its size.
func (t *grants) resize(size int) {
	t.old, t.place = t.index, 0
	t.index = make([]uint64, size)
}

// moveOn moves the entries of some places of the old index.
func (t *grants) moveOn(looks int) {
	for ; t.old != nil && looks > 0; looks-- {
		if t.place == len(t.old) {
			t.old = nil
		} else if e := t.old[t.place]; e != 0 {
			unlink(t.old, uint64(t.place)) // another entry may come to the place
			link(t.index, e)
		} else {
			t.place++
		}
	}
}

// bytes returns the rest of a page of the log, from a place.
func (t *grants) bytes(at uint64) []byte {
	return t.pages[at/uint64(len(page{}))-t.head/uint64(len(page{}))][at%uint64(len(page{})):]
}

// word returns the word at a place, which is a multiple of a word's size.
func (t *grants) word(at uint64) uint64 { return binary.LittleEndian.Uint64(t.bytes(at)) }

// read appends some bytes of the log to dst.
func (t *grants) read(dst []byte, at uint64, size int) []byte {
	for size > 0 {
		b := t.bytes(at)
		n := min(size, len(b))
		dst = append(dst, b[:n]...)
		at, size = at+uint64(n), size-n
	}
	return dst
}

// holds reports whether the log has a text at a place.
func (t *grants) holds(at uint64, text []byte) bool {
	for len(text) > 0 {
		b := t.bytes(at)
		n := min(len(text), len(b))
		if string(b[:n]) != string(text[:n]) {
			return false
		}
		at, text = at+uint64(n), text[n:]
	}
	return true
}

// write writes a record at the tail of the log, and returns its place.
func (t *grants) write(record []byte) (at uint64) {
	at = t.tail
	for len(record) > 0 {
		if t.tail%uint64(len(page{})) == 0 {
			t.pages = append(t.pages, new(page))
		}
		n := copy(t.bytes(t.tail), record)
		t.tail += uint64(n)
		record = record[n:]
	}
	return at
}

// drop removes the record at the head of the log.
func (t *grants) drop(size int) {
	t.due = 0
	first := t.head / uint64(len(page{}))
	t.head += uint64(size)
	for range t.head/uint64(len(page{})) - first {
		t.pages[0] = nil
		t.pages = t.pages[1:]
	}
	if t.head == t.tail {
		t.head, t.tail, t.pages, t.index, t.old = 0, 0, nil, nil, nil
	}
}

// appendCharges appends the fields of charges by which driver.SameCharge compares them.
func appendCharges(dst []byte, cs []quota.Charge) []byte {
	for i := range cs {
		c := &cs[i]
		for _, text := range [...]string{c.Limit.Name(), c.Key} {
			dst = append(binary.AppendUvarint(dst, uint64(len(text))), text...)
		}
		op := byte(c.Op)
		if c.Shadow {
			op |= 1 << 7
		}
		few := [...]int64{int64(c.MadeAt), int64(c.Within), c.Floor, int64(c.FloorOf), c.Least, c.Held, int64(c.Until), int64(c.Alternative)}
		if few != [len(few)]int64{} {
			op |= 1 << 6
		}
		dst = binary.AppendVarint(append(dst, op), c.Cost)
		for j := 0; op&(1<<6) != 0 && j < len(few); j++ {
			dst = binary.AppendVarint(dst, few[j])
		}
	}
	return dst
}
