package resilience

import (
	"errors"
	"fmt"
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
	for {
		n.mu.Lock()
		queue, dropped := n.queue, n.dropped
		n.queue, n.dropped = nil, 0
		n.running = len(queue) > 0
		n.mu.Unlock()
		if len(queue) == 0 {
			return
		}
		for _, notice := range queue {
			n.tell(notice)
		}
		if dropped > 0 {
			n.tell(quota.Notice{Name: "notices", Text: fmt.Sprintf("%d notices were dropped: their receiver is too slow", dropped)})
		}
	}
}

// abandonedPanic reports a panic in a call that no caller waits for, or passes it on if notices have no
// receiver.
func (n *notifier) abandonedPanic(p *Panic) {
	if n.tell == nil {
		panic(p)
	}
	n.send("panic", "the store panicked in a call that was abandoned", p)
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
