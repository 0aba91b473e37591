package local

import (
	"math/rand/v2"
	"sync"
	"unique"

	"github.com/fleetquota/fleetquota/quota"
)

// shard is a hash table: an open-addressed index of slot numbers over pages of slots. Slots never move
// while in use and hold no pointers but the key's, which keeps a key small and cheap to collect.
type shard struct {
	mu    sync.Mutex
	index []uint64 // 32 bits of hash and a slot number plus one; 0 is empty
	pages []*page
	tails map[int][]int64 // State.Tail of the slots that have one
	live  int             // slots in use
	used  int             // slots ever handed out
	free  int             // a freed slot's number plus one, the first of a list; 0 is none
	hand  int             // the slot that sweep looks at next
	due   int             // looks that sweep owes, in eighths
	turns int             // times that tidy swept
	_     [24]byte        // keeps neighbours' locks off one cache line
}

const pageSize = 16

type page [pageSize]slot

type slot struct {
	key     string // "" is a free slot
	limit   unique.Handle[string]
	rule    quota.Rule
	unit    int64 // of a free slot: the next one's number plus one
	a, b, c int64
	expires quota.Micros // when the state is as fresh
}

func (sh *shard) slot(n int) *slot { return &sh.pages[n/pageSize][n%pageSize] }

// tag is the part of a hash that the index keeps; the rest chose the shard.
func tag(h uint64) uint64 { return h >> 32 }

// find returns the slot of a limit and key, or -1.
func (sh *shard) find(h uint64, c *quota.Charge) int {
	if len(sh.index) == 0 {
		return -1
	}
	mask := uint64(len(sh.index) - 1)
	limit := c.Limit.Handle()
	for i := tag(h) & mask; ; i = (i + 1) & mask {
		e := sh.index[i]
		if e == 0 {
			return -1
		}
		if e>>32 == tag(h) {
			n := int(uint32(e)) - 1
			if sl := sh.slot(n); sl.limit == limit && sl.key == c.Key {
				return n
			}
		}
	}
}

// load fills a zero Item with what slot n holds, unless n is negative or what it holds is as fresh.
func (sh *shard) load(n int, now quota.Micros, it *quota.Item) {
	if n < 0 {
		return
	}
	sl := sh.slot(n)
	if sl.expires <= now {
		return
	}
	it.Rule = sl.rule
	it.State.Unit, it.State.A, it.State.B, it.State.C = sl.unit, sl.a, sl.b, sl.c
	if sh.tails != nil {
		it.State.Tail = sh.tails[n]
	}
}

func (sh *shard) save(n int, it *quota.Item, expires quota.Micros) {
	sl := sh.slot(n)
	sl.rule = it.Rule
	sl.unit, sl.a, sl.b, sl.c = it.State.Unit, it.State.A, it.State.B, it.State.C
	sl.expires = expires
	if it.State.Tail != nil {
		sh.setTail(n, it.State.Tail)
	} else if sh.tails != nil {
		delete(sh.tails, n)
	}
}

// insert makes a slot for a key that find did not find.
func (sh *shard) insert(h uint64, key string, limit unique.Handle[string]) int {
	if 4*(sh.live+1) > 3*len(sh.index) {
		sh.resize(max(16, 2*len(sh.index)))
	}
	n := sh.free - 1
	if n >= 0 {
		sh.free = int(sh.slot(n).unit)
	} else {
		n = sh.extend()
	}
	sl := sh.slot(n)
	sl.key, sl.limit = key, limit
	sh.live++
	sh.link(tag(h), n)
	return n
}

func (sh *shard) link(tag uint64, n int) {
	mask := uint64(len(sh.index) - 1)
	i := tag & mask
	for sh.index[i] != 0 {
		i = (i + 1) & mask
	}
	sh.index[i] = tag<<32 | uint64(n+1)
}

// remove frees slot n, whose hash has this tag.
func (sh *shard) remove(tag uint64, n int) {
	mask := uint64(len(sh.index) - 1)
	i := tag & mask
	for uint32(sh.index[i]) != uint32(n+1) {
		i = (i + 1) & mask
	}
	// Close the gap: move back each entry of the run that may stand there (Knuth, TAOCP 6.4, algorithm R).
	for j := (i + 1) & mask; sh.index[j] != 0; j = (j + 1) & mask {
		if home := sh.index[j] >> 32 & mask; (j-home)&mask >= (j-i)&mask {
			sh.index[i] = sh.index[j]
			i = j
		}
	}
	sh.index[i] = 0
	delete(sh.tails, n)
	*sh.slot(n) = slot{unit: int64(sh.free)}
	sh.free = n + 1
	sh.live--
}

// resize gives the index another size, a power of two.
func (sh *shard) resize(size int) {
	old := sh.index
	sh.index = make([]uint64, size)
	for _, e := range old {
		if e != 0 {
			sh.link(e>>32, int(uint32(e))-1)
		}
	}
}

// tidy does the share of sweeping that the charges since the last tidy owe.
func (sh *shard) tidy(now quota.Micros, s *Store) {
	if sh.due >= 8 {
		sh.sweep(sh.due/8, now, s)
		sh.due = 0
		if sh.turns++; sh.turns%8 == 0 {
			sh.tidyAnother(now, s)
		}
	}
}

// tidyAnother sweeps a little in some other shard: perhaps nobody charges to its keys any more. The
// caller may hold other locks, so it does not wait for that one.
func (sh *shard) tidyAnother(now quota.Micros, s *Store) {
	if other := &s.shards[rand.N(shardCount)]; other.mu.TryLock() {
		other.sweep(8, now, s)
		other.mu.Unlock()
	}
}

// sweep looks at some places of the index, removes slots whose state is as fresh, and returns how many
// these were.
func (sh *shard) sweep(looks int, now quota.Micros, s *Store) (freed int) {
	for ; looks > 0 && sh.live > 0; looks-- {
		if sh.hand++; sh.hand >= len(sh.index) {
			sh.hand = 0
		}
		// What a removal moves to this place is looked at as well.
		for e := sh.index[sh.hand]; e != 0; e = sh.index[sh.hand] {
			n := int(uint32(e)) - 1
			if sh.slot(n).expires > now {
				break
			}
			sh.remove(e>>32, n)
			freed++
		}
	}
	if freed > 0 {
		s.keys.Add(-int64(freed))
		if 8*sh.live < len(sh.index) && len(sh.index) > 16 {
			sh.shrink()
		}
	}
	return freed
}

// shrink moves the slots in use together and gives the rest of the memory back.
func (sh *shard) shrink() {
	index, pages, tails := sh.index, sh.pages, sh.tails
	sh.index = make([]uint64, max(16, len(index)/4))
	sh.pages, sh.tails, sh.used, sh.free, sh.hand = nil, nil, 0, 0, 0
	for _, e := range index {
		if e == 0 {
			continue
		}
		from := int(uint32(e)) - 1
		n := sh.extend()
		*sh.slot(n) = pages[from/pageSize][from%pageSize]
		if t, ok := tails[from]; ok {
			sh.setTail(n, t)
		}
		sh.link(e>>32, n)
	}
}

// extend hands out a slot that was never used.
func (sh *shard) extend() int {
	n := sh.used
	if sh.used++; n/pageSize == len(sh.pages) {
		sh.pages = append(sh.pages, new(page))
	}
	return n
}

func (sh *shard) setTail(n int, tail []int64) {
	if sh.tails == nil {
		sh.tails = make(map[int][]int64)
	}
	sh.tails[n] = tail
}
