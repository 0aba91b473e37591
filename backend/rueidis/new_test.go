package rueidis_test

import (
	"errors"
	"strings"
	"testing"

	fleetrueidis "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/quota"
)

func TestNewRefuses(t *testing.T) {
	if s, err := fleetrueidis.New(nil, nil); s != nil || !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "rueidis.Client") {
		t.Errorf("New of no client: got %v, error %v; want ErrInvalid that names rueidis.Client", s, err)
	}
}
