package engine

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// logs is a client of a server whose every key has the same state, from which each charge is denied; "" is a fresh one.
type logs struct {
	mu    sync.Mutex
	state string
	now   quota.Micros
	most  int   // bytes of states in a script
	keys  []int // of the scripts
}

func (l *logs) Do(_ context.Context, args []any, keys int) (Reply, error) {
	time.Sleep(time.Millisecond)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keys = append(l.keys, keys)
	l.most = max(l.most, keys*len(l.state))
	r, stamp := elements{int64(l.now), int64(0)}, int64(-l.now)
	if l.state == "" {
		r[1], stamp = changes(args[3+keys:]), int64(l.now)
	}
	if len(args) < 3+keys+6 {
		return singleReply(stamp, l.state), nil
	}
	for range keys {
		r = append(r, l.state)
	}
	return r, nil
}

func (*logs) Info(context.Context) ([]string, error) { return nil, nil }
func (*logs) Close() error                           { return nil }

// A batch is bounded by its work: large states go few at a time, from the first batch on. Small ones go together as ever,
// and so they do again when large states have become small. A list goes whole.
func TestBatchOfLargeStates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := quota.Micros(time.Now().UnixMicro())
		stateOf := func(a quota.Algorithm, entries int) string {
			var it driver.Item
			c := quota.Charge{Limit: limitOf("n", a), Key: "k", Cost: 1}
			var d quota.Decision
			for i := range entries {
				if err := driver.ApplyOne(&c, &it, now-quota.Micros(entries-i), &d); err != nil || !d.Allowed {
					t.Fatalf("entry %d: got %v, error %v; want a grant", i, d, err)
				}
			}
			return pack(&it)
		}
		for _, entries := range []int64{4000, 1000, 100, 3} {
			rule := algorithm.SlidingWindowLog(entries, time.Hour)
			limit := limitOf("n", rule)
			client := &logs{state: stateOf(rule, int(entries)), now: now}
			s := quota.Must(New(client, false, Options{Batching: BatchAll}))
			charge := func(i int) quota.Charge { return quota.Charge{Limit: limit, Key: strconv.Itoa(i), Cost: 1} }
			load := func(rounds int) {
				var all sync.WaitGroup
				for g := range 200 {
					all.Go(func() {
						for i := range rounds {
							if _, err := s.Charge(bg, charge(1000*i+g)); err != nil {
								t.Errorf("Charge: got error %v, want none", err)
							}
						}
					})
				}
				all.Wait()
			}
			load(4)
			const most = maxBatch * pieceSize
			largest := slices.Max(client.keys)
			if client.most > most {
				t.Errorf("logs of %d entries: got %d bytes of states in a script (%v keys), want %d or fewer", entries, client.most, client.keys, most)
			}
			if largest < maxBatch*2/3 && len(client.state)*largest < most*2/3 {
				t.Errorf("logs of %d entries: got %d keys in the largest script, want more, as %d bytes fit", entries, largest, most)
			}
			client.keys = nil
			cs := make([]quota.Charge, maxBatch)
			for i := range cs {
				cs[i] = charge(i)
			}
			if err := s.ChargeAll(bg, cs, make([]quota.Decision, len(cs))); err != nil || fmt.Sprint(client.keys) != "[64]" {
				t.Errorf("a list of 64 logs of %d entries: got scripts of %v keys, error %v; want one of 64", entries, client.keys, err)
			}
			client.state, client.keys = "", nil // the windows have passed
			load(8)
			if largest = slices.Max(client.keys); largest < maxBatch*2/3 {
				t.Errorf("logs of %d entries that are empty: got scripts of %v keys, want more in the end", entries, client.keys)
			}
			s.Close()
		}
	})
}
