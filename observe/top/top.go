package top

import (
	"context"
	"fmt"
	"hash/maphash"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/observe/internal/calls"
	"github.com/fleetquota/fleetquota/quota"
)

// Defaults and bounds of [Options].
const (
	DefaultKeys   = 100
	DefaultWindow = 10 * time.Minute
	MaxKeys       = 1 << 20
	MaxLimits     = 64 // limits that have rankings; charges to further ones are in Report.Uncounted
)

// Options are the options of New. The zero value, and nil, take the defaults.
type Options struct {
	// Keys bounds the error of a row, to one part in Keys of the ranking's total, and the memory: 1 to MaxKeys; 0 is
	// DefaultKeys.
	Keys int
	// Window is the shortest time that rankings cover, once the observer is as old; 0 is DefaultWindow.
	Window time.Duration
	// Key returns the text that is ranked in place of a key: quota.Group ranks groups, and a hash hides the keys. nil
	// ranks the keys. It is called for each charge, concurrently.
	Key func(key string) string
}

// An Observer ranks the keys of the calls that it is told. [New] makes one. As an http.Handler it serves its own report, see
// [Handler].
type Observer struct {
	o     Options
	began time.Time
	seed  maphash.Seed

	limits    calls.Limits[limit]
	uncounted atomic.Int64
}

// New returns an observer. Options that are not accepted are [quota.ErrInvalid].
func New(o *Options) (*Observer, error) {
	t := &Observer{began: time.Now(), seed: maphash.MakeSeed()}
	if o != nil {
		t.o = *o
	}
	switch {
	case t.o.Keys < 0 || t.o.Keys > MaxKeys:
		return nil, fmt.Errorf("top: %w: Options.Keys is %d; accepted: 0 to %d", quota.ErrInvalid, t.o.Keys, MaxKeys)
	case t.o.Window < 0:
		return nil, fmt.Errorf("top: %w: Options.Window is %v; accepted: 0 or more", quota.ErrInvalid, t.o.Window)
	}
	if t.o.Keys == 0 {
		t.o.Keys = DefaultKeys
	}
	if t.o.Window == 0 {
		t.o.Window = DefaultWindow
	}
	return t, nil
}

// The two rankings of a limit.
const (
	denied = iota
	used
	rankings
)

// Observe counts a call. It is one of quota.Options.Observers.
func (t *Observer) Observe(_ context.Context, call *quota.Call) {
	if call.Err != nil {
		return
	}
	now := time.Since(t.began)
	for i := range call.Decisions {
		c, d := &call.Charges[i], &call.Decisions[i]
		switch {
		case d.Replayed:
		case d.Charged != 0:
			t.count(now, used, c, d.Charged)
		case !call.Granted && !d.Allowed && !d.Shadow && c.Op != quota.OpPeek && c.Op != quota.OpRenew && d.Source != quota.FromClosed &&
			d.Alternative == call.Decisions[call.Decider].Alternative:
			t.count(now, denied, c, max(1, min(c.Cost, c.Limit.Capacity())))
		}
	}
}

// count adds a weight to a key of a ranking, or where it is negative to the tokens that the key gave back.
func (t *Observer) count(now time.Duration, ranking int, c *quota.Charge, weight int64) {
	l := t.limits.Find(c.Limit)
	if l == nil {
		if l = t.limits.Add(c.Limit, MaxLimits, func() *limit { return &limit{} }); l == nil {
			t.uncounted.Add(1)
			return
		}
	}
	key := c.Key
	if t.o.Key != nil {
		key = t.o.Key(key)
	}
	s := &l.shards[maphash.String(t.seed, key)%shards]
	s.mu.Lock()
	s.advance(int64(now / t.o.Window))
	s.now[ranking].add(key, weight, t.o.Keys)
	s.mu.Unlock()
}

// shards is how many parts the rankings of a limit have, by a hash of the key, so that callers seldom wait for each other.
const shards = 8

// limit has the rankings of a limit.
type limit struct{ shards [shards]shard }

type shard struct {
	mu     sync.Mutex
	window int64 // the number of the window in now; before has the one before it
	now    [rankings]table
	before [rankings]table
	_      [64]byte // the next shard is another processor's
}

// advance begins a window, if it is not begun. The caller holds s.mu.
func (s *shard) advance(window int64) {
	if window <= s.window {
		return
	}
	s.now, s.before = s.before, s.now
	for i := range s.now {
		s.now[i].clear()
		if window > s.window+1 {
			s.before[i].clear()
		}
	}
	s.window = window
}

// table is a ranking of one shard in one window, by Space-Saving.
type table struct {
	rows   []row            // a heap: the lightest first
	index  map[string]int32 // of each key in rows
	total  int64            // the sum of all weights, of keys without a row too
	absent int64            // the most that a key without a row can weigh
}

type row struct {
	key                string
	weight, over, back int64
}

func (t *table) clear() {
	clear(t.rows)
	clear(t.index)
	t.rows, t.total, t.absent = t.rows[:0], 0, 0
}

// add adds a weight to a key. Where all of the rows are in use, the lightest becomes the key's: the weight that it had is an
// upper bound of the weight that the key can have had before.
func (t *table) add(key string, weight int64, rows int) {
	i, ok := t.index[key]
	if weight < 0 {
		if ok {
			t.rows[i].back = sum(t.rows[i].back, -weight)
		}
		return
	}
	t.total = sum(t.total, weight)
	if !ok {
		key = strings.Clone(key) // the caller's may be a part of a larger text
		if len(t.rows) < rows {
			i = t.up(row{key: key})
		} else {
			i = 0
			r := &t.rows[0]
			delete(t.index, r.key)
			t.absent = r.weight
			*r = row{key: key, weight: r.weight, over: r.weight}
			t.index[key] = 0
		}
	}
	t.rows[i].weight = sum(t.rows[i].weight, weight)
	t.down(i)
}

// up adds a row of weight 0, the lightest, and returns its index.
func (t *table) up(r row) int32 {
	if t.index == nil {
		t.index = map[string]int32{}
	}
	t.rows = append(t.rows, r)
	i := int32(len(t.rows) - 1)
	for i > 0 {
		t.move(i, (i-1)/2)
		i = (i - 1) / 2
	}
	t.rows[0] = r
	t.index[r.key] = 0
	return 0
}

// down moves a row, which has become heavier, to its place.
func (t *table) down(i int32) {
	r, n := t.rows[i], int32(len(t.rows))
	from := i
	for {
		child := 2*i + 1
		if child >= n {
			break
		}
		if child+1 < n && t.rows[child+1].weight < t.rows[child].weight {
			child++
		}
		if t.rows[child].weight >= r.weight {
			break
		}
		t.move(i, child)
		i = child
	}
	if i != from {
		t.rows[i] = r
		t.index[r.key] = i
	}
}

// move copies the row at j to i.
func (t *table) move(i, j int32) {
	t.rows[i] = t.rows[j]
	t.index[t.rows[i].key] = i
}

// sum adds two numbers that are not negative, up to the largest.
func sum(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}
