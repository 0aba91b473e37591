package driver_test

import (
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// TestSizes makes the largest texts, which have exactly the sizes that stores are told.
func TestSizes(t *testing.T) {
	group, id := strings.Repeat("{", quota.MaxKey), strings.Repeat(" ", 128)
	if got := max(len(driver.AppendIDKey(nil, group, id)), len(driver.AppendKey(nil, strings.Repeat("n", 64), group))); got != driver.MaxStoredKey {
		t.Errorf("longest key: got %d bytes, want %d", got, driver.MaxStoredKey)
	}
	it := driver.Item{Rule: quota.Rule{'r', 'u', 'l', 'e', '1', '2', '3', '4'}, State: quota.State{Tail: make([]int64, quota.MaxTail)}}
	for _, n := range []*int64{&it.State.Unit, &it.State.A, &it.State.B, &it.State.C} {
		*n = -quota.MaxNumber
	}
	for i := range it.State.Tail {
		it.State.Tail[i] = -quota.MaxNumber
	}
	if got := len(it.AppendText(nil)); got != driver.MaxStoredValue {
		t.Errorf("longest value: got %d bytes, want %d", got, driver.MaxStoredValue)
	}
}
