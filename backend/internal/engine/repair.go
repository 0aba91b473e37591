package engine

import (
	"strings"
	"sync"
	"time"
)

// IsDemoted reports whether an error reply says that the server is a replica. Then the client's connections lead to a
// server that was the primary when they were made, and its address may lead to the new primary by now.
func IsDemoted(reply error) bool {
	said, _ := scriptError(strings.TrimPrefix(reply.Error(), "ERR "))
	code, _, _ := strings.Cut(said, " ")
	return code == "READONLY" || code == "MASTERDOWN"
}

const (
	// minRepairPause and maxRepairPause bound the time from one repair to the next. It doubles while further ones are
	// asked for: the address may go on leading to a replica.
	minRepairPause = 250 * time.Millisecond
	maxRepairPause = 4 * time.Second
)

// Repair has a client leave the connections that lead to a demoted primary. Methods may be called concurrently.
type Repair struct {
	// Do makes the repair. There is one at a time.
	Do func()

	mu      sync.Mutex
	running bool
	closed  bool
	pause   time.Duration // after the next repair
	next    time.Time     // when it may begin
	repairs sync.WaitGroup
}

// Soon repairs in the background, unless a repair is under way or was a moment ago.
func (r *Repair) Soon() {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if r.running || r.closed || now.Before(r.next) {
		return
	}
	if r.pause == 0 || now.Sub(r.next) > r.pause { // the last repair helped
		r.pause = minRepairPause
	}
	r.running = true
	r.repairs.Go(func() {
		defer r.ended()
		Catch("the client", false, func() error { r.Do(); return nil }) // calls will tell
	})
}

func (r *Repair) ended() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running = false
	r.next = time.Now().Add(r.pause)
	r.pause = min(2*r.pause, maxRepairPause)
}

// Close refuses further repairs.
func (r *Repair) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
}

// Wait returns when no repair is under way. The Repair must be closed.
func (r *Repair) Wait() { r.repairs.Wait() }
