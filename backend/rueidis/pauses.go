package rueidis

import (
	"context"
	"sync"
	"time"
)

// pauses holds calls back while connections are ended, so that none is lost on them. The zero value holds none back.
type pauses struct {
	mu      sync.Mutex
	calls   int           // under way
	resumed chan struct{} // closed at the end of the present pause; nil if there is none
	idle    chan struct{} // closed when no call is under way; nil unless that is waited for
}

// enter begins a call, after the present pause. It returns the context's error if that ends before.
func (p *pauses) enter(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.resumed != nil {
		resumed := p.resumed
		p.mu.Unlock()
		select {
		case <-resumed:
			p.mu.Lock()
		case <-ctx.Done():
			p.mu.Lock()
			return ctx.Err()
		}
	}
	p.calls++
	return nil
}

func (p *pauses) exit() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.calls--; p.calls == 0 && p.idle != nil {
		close(p.idle)
		p.idle = nil
	}
}

// during calls f while no call is under way. It does not if that takes longer than patience.
func (p *pauses) during(patience time.Duration, f func()) {
	idle, resumed := make(chan struct{}), make(chan struct{})
	p.mu.Lock()
	p.resumed = resumed
	if p.calls == 0 {
		close(idle)
	} else {
		p.idle = idle
	}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.idle, p.resumed = nil, nil
		close(resumed)
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-idle:
		f()
	case <-timer.C:
	}
}
