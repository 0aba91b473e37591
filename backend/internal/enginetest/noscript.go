package enginetest

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// NoScript: a server that lost its scripts is told the text once, and only then.
func NoScript(t *testing.T, connect Connect) {
	server, open := single(t, connect)
	store := open(engine.Options{})
	a, b := yearly("a", 1000), limitOf("b", quota.Must(newRule(bucket, 1000, 1, time.Hour)))
	unscripted := limitOf("c", hidden{quota.Must(newRule(first, 1000, 1, year))})
	id := 0
	calls := map[string]func(){
		"single": func() { take(t, store, quota.Charge{Limit: a, Key: "k", Cost: 1}) },
		"list": func() {
			takeAll(t, store, quota.Charge{Limit: a, Key: "k", Cost: 1}, quota.Charge{Limit: b, Key: "k", Cost: 1})
		},
		"id": func() {
			id++
			take(t, store, quota.Charge{Limit: b, Key: "k", Cost: 1, ID: string(rune('a' + id))})
		},
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			for range 2 {
				if err := server.ScriptFlush(bg).Err(); err != nil {
					t.Fatal(err)
				}
				server.resetCounts(t)
				for range 3 {
					call()
				}
				n := server.count(t)
				if n["evalsha"].calls != 3 || n["evalsha"].failed != 1 || n["eval"].calls != 1 {
					t.Errorf("EVALSHA %+v and EVAL %+v for three calls", n["evalsha"], n["eval"])
				}
			}
		})
	}
	t.Run("swap", func(t *testing.T) {
		server.ScriptFlush(bg)
		for i := range int64(3) {
			if d := take(t, store, quota.Charge{Limit: unscripted, Key: "k", Cost: 1}); d.Remaining != 999-i {
				t.Errorf("%+v", d)
			}
		}
	})
	t.Run("under load", func(t *testing.T) {
		c := quota.Charge{Limit: yearly("load", 1_000_000), Key: "k", Cost: 1}
		var granted atomic.Int64
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for range sized(200, 2000) {
					d, err := store.Take(bg, c)
					if err != nil || !d.Allowed {
						t.Errorf("%+v, %v", d, err)
						return
					}
					granted.Add(1)
				}
			})
		}
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		for flushing := true; flushing; {
			server.ScriptFlush(bg)
			select {
			case <-done:
				flushing = false
			default:
			}
		}
		c.Op = quota.OpPeek
		if d := take(t, store, c); d.Limit-d.Remaining != granted.Load() {
			t.Errorf("%d charged for %d grants", d.Limit-d.Remaining, granted.Load())
		}
	})
}
