package conformance

import (
	"runtime"
	"sync"
	"time"
)

// A machine that is busy with other work gives little of its time to a store. The suite measures how little, by work of its own, and waits
// for the store as much longer.

// usualWork is the time that work takes on a machine of the usual speed with nothing else to do, or less.
const usualWork = 20 * time.Millisecond

// work does some arithmetic, for longer than a machine lets one of several programs run at a stretch.
func work() {
	x := uint64(88172645463325252)
	for range 1 << 21 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
	}
	runtime.KeepAlive(x)
}

// machine is the last measurement.
var machine struct {
	sync.Mutex
	at       time.Time
	slowness float64
}

// slowness returns how many times as long as usual this machine works on the same thing now: 1 or more. It measures a few times a second
// at most.
func slowness() float64 {
	m := &machine
	m.Lock()
	defer m.Unlock()
	if m.at.IsZero() || time.Since(m.at) > 200*time.Millisecond {
		start := time.Now()
		work()
		m.slowness = max(1, float64(time.Since(start))/float64(usualWork))
		m.at = time.Now()
	}
	return m.slowness
}
