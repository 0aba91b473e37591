package resilience

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// maxNotices bounds the notices that wait for a slow receiver.
const maxNotices = 64

// notifier delivers notices in order on a goroutine of its own, which ends when none is left. So notices may
// be sent under a lock, and a slow receiver delays no decision. The zero value delivers none.
type notifier struct {
	tell func(quota.Notice)

	mu      sync.Mutex
	queue   []quota.Notice
	dropped int
	running bool
}

func (n *notifier) send(name, text string, err error) {
	if n.tell == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.queue) >= maxNotices {
		n.dropped++
		return
	}
	n.queue = append(n.queue, quota.Notice{Name: name, Text: text, Err: err})
	if !n.running {
		n.running = true
		go n.run()
	}
}

func (n *notifier) run() {
	ended := false
	defer func() {
		if !ended { // by runtime.Goexit in the receiver: the next notice starts another goroutine
			n.mu.Lock()
			n.running = false
			n.mu.Unlock()
		}
	}()
	tell := guarded(n.tell)
	for {
		n.mu.Lock()
		queue, dropped := n.queue, n.dropped
		n.queue, n.dropped = nil, 0
		n.running = len(queue) > 0
		n.mu.Unlock()
		if len(queue) == 0 {
			ended = true
			return
		}
		for _, notice := range queue {
			tell(notice)
		}
		if dropped > 0 {
			tell(quota.Notice{Name: "notices", Text: fmt.Sprintf("%d notices were dropped: their receiver is too slow", dropped)})
		}
	}
}

// guarded returns a receiver of notices whose panic is logged: it is called on goroutines on which a panic would end the
// process.
func guarded(tell func(quota.Notice)) func(quota.Notice) {
	return func(n quota.Notice) {
		defer func() {
			if v := recover(); v != nil {
				slog.Error("resilience: a receiver of notices panicked", "err", newPanic(v))
			}
		}()
		tell(n)
	}
}

// abandonedPanic reports a panic in a call that no caller waits for. Without a receiver of notices it is logged.
func (n *notifier) abandonedPanic(p *Panic) {
	const text = "the store panicked in a call for which no caller waits"
	if n.tell == nil {
		slog.Error("resilience: "+text, "err", p)
		return
	}
	n.send("panic", text, p)
}

// alarm reports a misconfigured store, at most once a minute.
type alarm struct {
	*notifier
	on    bool // otherwise another policy reports it
	base  time.Time
	after atomic.Int64 // time since base before which it is silent
}

// check reports err if it says that the store is misconfigured.
func (a *alarm) check(err error) {
	if !a.on || !errors.Is(err, quota.ErrMisconfigured) {
		return
	}
	now := int64(time.Since(a.base))
	if after := a.after.Load(); now >= after && a.after.CompareAndSwap(after, now+int64(time.Minute)) {
		a.send("misconfigured", "the store is misconfigured: its content or its permissions do not fit; charges fail, and no policy answers them", err)
	}
}
