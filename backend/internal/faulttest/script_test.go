package faulttest

import (
	"sync"
	"testing"
	"time"
)

// TestScriptFlush makes the servers forget the scripts again and again: no caller may notice.
func TestScriptFlush(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		eachPlace(t, func(t *testing.T, p place) {
			s := l.open(t, p.direct)
			limit, list := yearly(plenty), keys(16)
			done := make(chan struct{})
			var flushes int
			var wg sync.WaitGroup
			wg.Go(func() {
				for {
					select {
					case <-done:
						return
					case <-time.After(3 * time.Millisecond):
					}
					for _, s := range p.servers {
						if _, err := s.Do("SCRIPT", "FLUSH"); err != nil {
							t.Error(err)
						}
					}
					flushes++
				}
			})
			y := calls(s, limit, list, sized(3000, 30_000))
			close(done)
			wg.Wait()
			t.Logf("%d flushes: %v", flushes, y)
			y.only(t)
			y.exact(t, charged(t, s, limit, list...))
			if flushes < 5 {
				t.Errorf("only %d flushes", flushes)
			}
		})
	})
}
