package clienttest

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// prompt: a store from a URL says that it is prompt, and each of its calls returns by its deadline, whatever becomes of
// the server. The client's own timeouts are longer, so that none of them keeps the promise. Rule C7 of package
// conformance asks the same of a server that is frozen.
func prompt(t *testing.T, l library) {
	const deadline = 100 * time.Millisecond
	const late = 1500 * time.Millisecond // on a loaded machine; a call that heeds another bound is late by five seconds or more
	freeze := func(s *redisserver.Server, _ *redisserver.Proxy) error { return s.Pause() }
	for name, fault := range map[string]func(*redisserver.Server, *redisserver.Proxy) error{
		"frozen":             freeze,
		"frozen, many":       freeze,
		"frozen, reset":      func(s *redisserver.Server, p *redisserver.Proxy) error { defer p.Reset(); return s.Pause() },
		"killed":             func(s *redisserver.Server, _ *redisserver.Proxy) error { s.Kill(); return nil },
		"frozen from before": nil,
	} {
		t.Run(name, func(t *testing.T) {
			callers, parameters := 32, ""
			if name == "frozen, many" {
				callers, parameters = 512, "&batching=none" // more calls than rueidis has room for on its connections
			}
			server := redisserver.Start(t)
			proxy := redisserver.StartProxy(t, server.Addr())
			s := l.open(t, "redis://"+proxy.Addr()+"?timeout=5s&dial_timeout=5s"+parameters)
			if !driver.IsPrompt(s) {
				t.Fatal("Prompt: got false, want true")
			}
			limit, list := counted(plenty), keys(8)
			if fault == nil {
				ok(t, server.Pause())
			} else {
				for _, k := range list {
					take(t, s, quota.Charge{Limit: limit, Key: k, Cost: 1})
				}
			}
			end := time.Now().Add(time.Duration(sized(1500, 3000)) * time.Millisecond)
			var mu sync.Mutex
			var slowest time.Duration
			var why string
			var all sync.WaitGroup
			for i := range callers {
				all.Go(func() {
					for time.Now().Before(end) {
						ctx, cancel := context.WithTimeout(bg, deadline)
						start := time.Now()
						_, err := s.Charge(ctx, quota.Charge{Limit: limit, Key: list[i%len(list)], Cost: 1})
						took := time.Since(start)
						cancel()
						mu.Lock()
						if took > slowest {
							slowest, why = took, fmt.Sprint(err)
						}
						mu.Unlock()
						time.Sleep(5 * time.Millisecond)
					}
				})
			}
			if fault != nil {
				time.Sleep(50 * time.Millisecond)
				ok(t, fault(server, proxy))
			}
			all.Wait()
			t.Logf("slowest call %v: %s", slowest.Round(time.Millisecond), why)
			if slowest > deadline+late {
				t.Errorf("slowest call: got %v, want at most its deadline of %v: %s", slowest, deadline, why)
			}
			if server.Running() {
				return
			}
			server.Resume() // so that it ends
		})
	}
}
