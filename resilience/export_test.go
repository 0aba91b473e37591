package resilience

import (
	"context"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Remembered returns how many denials a memory holds.
func Remembered(s quota.Store) (n int) {
	m, _ := driver.Find[*memory](s)
	for i := range m.shards {
		n += len(m.shards[i].denials)
	}
	return n
}

// Calls returns how many calls that a timeout handed over have not ended.
func Calls(s quota.Store) int {
	h, _ := driver.Find[*handOff](s)
	return len(h.slots)
}

func NewDeadline(parent context.Context, at time.Time) *deadline {
	return &deadline{Context: parent, at: at}
}

// Release ends the context.
func (d *deadline) Release() { d.release() }

// Debts returns how many tokens the keys of a fallback owe, and how many keys owe any.
func Debts(s quota.Store) (tokens, keys int64) {
	f, _ := driver.Find[*fallback](s)
	tokens, debtors := f.debts()
	return tokens, int64(len(debtors))
}
